"""The race: trainings, the search for the teacher's samplers and scores, each by the command that a reader would type.

Every command resumes, so the race does: what is finished is not started again. A student that fails is named on the page
with its error, and the others go on.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.benchmark.spec import Benchmark
from fewstep.report.run_folder import RunFolder
from fewstep.run.settings import dump_run
from fewstep.system.bounds import read_json, shown
from fewstep.system.console import Progress, say
from fewstep.system.errors import EvaluationError, FileError
from fewstep.system.files import atomic_write
from fewstep.system.strict_yaml import write_yaml

__all__ = ["Race", "Student"]


@dataclass(frozen=True)
class Student:
    """One training: a method and a seed."""

    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name}-seed{self.seed}"


@dataclass
class Race:
    """A benchmark in its folder.

    Attributes:
        spec: the benchmark.
        out: the folder: `runs/` with a run folder a student, a file of scores an extractor, `logs/`.
        jobs: trainings at once, each on its share of the processor's cores.
        device: of trainings and scores.
        only: names of the students to train; empty: all. Those that are trained already are scored and shown in any case.
    """

    spec: Benchmark
    out: Path
    jobs: int = 1
    device: str = "auto"
    only: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in self.only:
            if name not in self.spec.students:
                raise EvaluationError(
                    f"`only` must name students of the file, got {name}. Try: {', '.join(self.spec.students)}"
                )
        self.students = [Student(name, seed) for seed in self.spec.seeds for name in self.spec.students]
        self.runs = {student: self.spec.run(student.name, student.seed) for student in self.students}

    def folder(self, student: Student) -> Path:
        """Run folder of a student."""
        return self.out / "runs" / str(student)

    def scores(self, extractor: str) -> Path:
        """File of the scores by an extractor."""
        return self.out / f"{extractor}.json"

    def run(self) -> None:
        """Train, search, score; what is done already is kept.

        Raises:
            EvaluationError: the search or a score failed, or every student.
            FileError: the folder holds another benchmark.
        """
        self._same()
        self.train()
        self.score()

    def train(self) -> None:
        """Train every student that is wanted and not finished, `jobs` at a time, seeds in the outer loop."""
        wanted = [student for student in self.students if not self.only or student.name in self.only]
        waiting = [student for student in wanted if not self.finished(student)]
        commands = {student: self._prepared(student) for student in waiting}
        running: dict[Student, subprocess.Popen[bytes]] = {}
        done = len(wanted) - len(waiting)
        share = max(1, (os.cpu_count() or 1) // self.jobs)
        with Progress("train", len(wanted), unit="students") as bar:
            try:
                while waiting or running:
                    while waiting and len(running) < self.jobs:
                        student = waiting.pop(0)
                        running[student] = self._started(str(student), commands[student], share)
                    bar.description = ", ".join(map(str, running))
                    bar.update(done)
                    time.sleep(0.2)
                    for student, process in list(running.items()):
                        if process.poll() is not None:
                            del running[student]
                            done += 1
                            if process.returncode:
                                say(
                                    f"{student} failed: {self.last_words(str(student))} (log: {self._log(str(student))})"
                                )
            finally:
                _end([*running.values()])
            bar.update(done)

    def score(self) -> None:
        """Score the teacher under its best samplers and all finished students, by each extractor."""
        spec, finished = self.spec, [student for student in self.students if self.finished(student)]
        if not finished:
            raise EvaluationError(
                f"at least one student must have been trained, got none. Look into {self.out / 'logs'}"
            )
        calls = ",".join(map(str, spec.calls))
        tuned = ["--calls", calls, "--samples", str(spec.tuned_on)]
        self._command("tune-sampler", ["tune-sampler", spec.teacher, *tuned, "--extractor", spec.extractors[0]])
        for extractor in spec.extractors:
            metrics = spec.metrics if extractor == spec.extractors[0] else ("fid",)
            shared = [
                "--samples", str(spec.samples), "--reference", spec.reference, "--extractor", extractor,
                "--metrics", ",".join(metrics), "--out", str(self.scores(extractor)),
            ]  # fmt: skip
            self._command(
                f"eval-{extractor}", ["eval", spec.teacher, "--evaluations", calls, "--sampler", "best", *shared]
            )
            folders = [str(self.folder(student)) for student in finished]
            self._command(f"eval-{extractor}", ["eval", *folders, "--evaluations", "0", *shared])

    def finished(self, student: Student) -> bool:
        """Return whether a student was trained to its end with these settings."""
        folder, file = self.folder(student), self._settings(student)
        if not (folder / "student.safetensors").exists() or not file.exists():
            return False
        now = write_yaml(self.runs[student].model_dump(mode="json"))
        return file.read_text(encoding="utf-8") == now and RunFolder(folder, str(student), 0).finished

    def rows(self, extractor: str) -> list[dict[str, Any]]:
        """Rows of the scores by an extractor."""
        return list(json.loads(self.scores(extractor).read_text())["rows"])

    def last_words(self, name: str) -> str:
        """Last line of a command's log, its error if it ended in one."""
        if not self._log(name).exists():
            return "not started"
        lines = [line.strip() for line in self._log(name).read_text(errors="replace").splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("fewstep ")]  # an error's line begins so
        return (said or lines or ["it said nothing"])[-1]

    def _settings(self, student: Student) -> Path:
        return self.out / "settings" / f"{student}.yaml"

    def _prepared(self, student: Student) -> list[str]:
        file = self._settings(student)
        file.parent.mkdir(parents=True, exist_ok=True)
        dump_run(self.runs[student], file)
        return ["distill", str(file), "--out", str(self.folder(student)), "--processes", "1"]

    def _log(self, name: str) -> Path:
        return self.out / "logs" / f"{name}.log"

    def _started(self, name: str, arguments: Sequence[str], threads: int | None = None) -> subprocess.Popen[bytes]:
        self._log(name).parent.mkdir(parents=True, exist_ok=True)
        device = ["--train.device" if arguments[0] == "distill" else "--device", self.device]
        words = [*arguments, *(device if self.device != "auto" else [])]
        with self._log(name).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "fewstep", *words], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}),
            )  # fmt: skip

    def _command(self, name: str, arguments: Sequence[str]) -> None:
        say(f"fewstep {shlex.join(arguments[:2])} ... (log: {self._log(name)})")
        process = self._started(name, arguments)
        try:
            code = process.wait()
        finally:
            _end([process])
        if code:
            raise EvaluationError(f"fewstep {arguments[0]} failed: {self.last_words(name)} (log: {self._log(name)})")

    def _same(self) -> None:
        """Keep the benchmark in its folder, and refuse a folder of another teacher or reference."""
        file = self.out / "benchmark.json"
        record = self.spec.model_dump(mode="json")
        if file.exists():
            before = read_json(file)
            if not isinstance(before, dict):
                raise FileError(f"{file} must describe a benchmark, got {shown(before)}. Try: another --out")
            for name in ("teacher", "reference", "samples"):
                if before.get(name) != record[name]:
                    raise FileError(
                        f"{self.out} holds a benchmark with {name} {shown(before.get(name))}, now {record[name]}. Try: another --out"
                    )
        elif self.out.exists() and any(self.out.iterdir()):
            raise FileError(f"`out` must be a new folder or a benchmark's, got {self.out}. Try: another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(record, indent=2))


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Let processes save and stop, in a minute each at most; the terminal's Ctrl-C has reached them, a kill of this one has not."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        if process.poll() is None:
            process.kill()
