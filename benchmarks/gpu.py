"""Measure fewstep on the GPU of this machine: what is right, what fits, how long it takes.

    python benchmarks/gpu.py --out findings              # nine minutes on one NVIDIA card
    python benchmarks/gpu.py --out findings --only card right sdxl
    python benchmarks/gpu.py --out findings --cpu --tiny # the same command on tiny networks, to test it

Nothing is downloaded: networks of the real shapes get random weights, made on the device. Each finding is one line of
FOLDER/findings.jsonl, on the disk as soon as it is found. A case that raises, is killed or takes too long is reported,
and the next one runs. Ctrl-C prints what there is. Needs the standard library alone: workers import the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.findings import Journal, rows, table  # noqa: E402

STARTING = 180  # seconds a worker may take to import torch and wake up the card
UNKNOWN = {"hardware": "unknown", "torch": "unknown"}


def main(arguments: list[str] | None = None) -> int:
    """Run the cases that were chosen; returns the number of failures, at most 99."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="no case runs after so many")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of findings.jsonl and worker.log")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages, or parts of a stage as STAGE/CASE")
    parser.add_argument("--cpu", action="store_true", help="on the processor, to test the command")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, likewise")
    parser.add_argument(
        "--list", action="store_true", help="print the cases and their time limits in seconds, and stop"
    )
    parser.add_argument("--package", default="benchmarks.stages", help="where the cases are; another one for tests")
    options = parser.parse_args(arguments)
    cases = list(importlib.import_module(options.package).CASES)
    unknown = [name for name in options.only or () if not any(_chosen(case, [name]) for case in cases)]
    if unknown:
        stages = ", ".join(dict.fromkeys(case.stage for case in cases))
        parser.error(
            f"--only must name stages ({stages}) or STAGE/CASE as --list prints them, got {', '.join(unknown)}"
        )
    stages = list(dict.fromkeys(case.stage for case in cases))
    cases = [case for case in cases if _chosen(case, options.only)]
    if options.list:
        for case in cases:
            print(f"{case.stage}/{case.name}: {case.seconds}")
        return 0
    command = f"python benchmarks/gpu.py {shlex.join(sys.argv[1:] if arguments is None else arguments)}".strip()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    journal = Journal(options.out / "findings.jsonl", {"command": command, "date": date})
    deadline = time.monotonic() + 60 * options.minutes
    # what needs no card is done meanwhile, by a worker that cannot see it
    beside = Lane([case for case in cases if case.beside], options, journal, deadline, hidden=True)
    front = Lane([case for case in cases if not case.beside], options, journal, deadline)
    thread = threading.Thread(target=beside.run, daemon=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        thread.start()
        front.run()
        while thread.is_alive():  # a join without a limit would not notice a signal
            thread.join(0.2)
    except KeyboardInterrupt:
        print("stopped: what was found until now follows", flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
        beside.stop()
        if thread.ident is not None:
            thread.join(10)
        print(table(rows(journal.lines, stages), command), flush=True)
        print(f"{len(journal.lines)} findings in {journal.path}", flush=True)
    return min(99, sum("error" in line for line in journal.lines))


def _chosen(case: Any, only: list[str] | None) -> bool:
    return only is None or case.stage in only or f"{case.stage}/{case.name}" in only


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


class Lane:
    """Cases one after the other, in a worker process that is replaced when it dies or hangs.

    Args:
        cases: what to run.
        options: of the command.
        journal: where findings go.
        deadline: on the monotonic clock; what has too little time before it is reported as not run.
        hidden: the worker sees no GPU.
    """

    def __init__(
        self, cases: list[Any], options: argparse.Namespace, journal: Journal, deadline: float, hidden: bool = False
    ) -> None:
        self.cases, self.options, self.journal, self.deadline, self.hidden = cases, options, journal, deadline, hidden
        self.worker: Worker | None = None
        self.stopped = False
        self.where = UNKNOWN

    def run(self) -> None:
        """Until all are done, the time is over, or `stop`."""
        broken = ""
        try:
            for case in self.cases:
                left = self.deadline - time.monotonic()
                if self.stopped:
                    return
                if broken or left < case.seconds / 4:
                    self._report(case, skipped=f"not run: {broken or f'{max(0, left):.0f} s left'}")
                    continue
                try:
                    self._start(left)
                except WorkerError as error:
                    broken = f"no worker starts: {error}"
                    self._report(case, error=broken)
                    continue
                limit = min(case.seconds, self.deadline - time.monotonic())
                try:
                    error, clean = self._one(case, time.monotonic() + limit)
                except WorkerError as failure:
                    error, clean = str(failure), False
                    if not error and limit < case.seconds:
                        self._report(case, skipped=f"cut off by --minutes after {limit:.0f} s")
                    elif not error:
                        error = f"took longer than its limit of {limit:.0f} s"
                if error and not self.stopped:
                    self._report(case, error=error)
                if not clean:
                    self._end()
        finally:
            self._end()

    def stop(self) -> None:
        """End `run`, from another thread."""
        self.stopped = True
        if (worker := self.worker) is not None:
            worker.kill()

    def _start(self, left: float) -> None:
        if self.worker is None:
            self.worker = Worker(self.options, self.hidden)
            self.where = self.worker.receive(time.monotonic() + min(STARTING, left))["hello"]

    def _one(self, case: Any, until: float) -> tuple[str, bool]:
        """Run a case; returns its error if there is one, and whether the worker can run another."""
        assert self.worker is not None
        print(f"{case.stage}/{case.name}", flush=True)
        self.worker.send(f"{case.stage}/{case.name}")
        while True:
            message = self.worker.receive(until)
            if "end" in message:
                return message["end"], message["clean"]
            self._report(case, **message)

    def _report(self, case: Any, **found: Any) -> None:
        for kind in ("error", "skipped"):
            if kind in found:
                print(f"{case.stage}/{case.name}: {kind}: {found[kind]}", flush=True)
        self.journal.add({"stage": case.stage, "case": case.name, "name": case.name, **found, **self.where})

    def _end(self) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.kill()
            worker.close()


class WorkerError(Exception):
    """A worker that died or took too long."""


class Worker:
    """A process that runs cases by name. Messages are JSON lines in a pipe of their own; all else it prints is logged."""

    def __init__(self, options: argparse.Namespace, hidden: bool) -> None:
        self._log = options.out / ("beside.log" if hidden else "worker.log")
        self._results, theirs = os.pipe()
        words = [options.package, str(options.out), str(theirs), *(["cpu"] if options.cpu or hidden else [])]
        words += ["tiny"] if options.tiny else []
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if hidden else {})
        with self._log.open("ab") as log:
            self._begin = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", *words], cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log,
                pass_fds=[theirs], start_new_session=True, env=environment,
            )  # fmt: skip
        os.close(theirs)
        self._buffer = b""

    def send(self, line: str) -> None:
        """Name the next case."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: `receive` says so
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()

    def receive(self, until: float) -> dict[str, Any]:
        """The next message.

        Raises:
            WorkerError: it died first; without text, `until` on the monotonic clock has passed.
        """
        while b"\n" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0:
                raise WorkerError
            if select.select([self._results], [], [], min(1, left))[0]:
                part = os.read(self._results, 2**16)
                self._buffer += part
                if not part:
                    raise WorkerError(self._death())
            elif self.process.poll() is not None:  # something that it started holds the pipe open
                raise WorkerError(self._death())
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _death(self) -> str:
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        with self._log.open("rb") as log:
            log.seek(self._begin)
            printed = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"the worker {how}{f': {printed[-1].strip()}' if printed else ''}"

    def kill(self) -> None:
        """End it with all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """Give the pipes back; nothing may be received afterwards."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        os.close(self._results)


if __name__ == "__main__":
    sys.exit(main())
