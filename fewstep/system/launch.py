"""Several processes on one machine from one command: on CPUs, one single-threaded process a core is the fastest.

Two threads in one process meet at a barrier in every operation; two processes meet once an update, for the gradients.
Under torchrun, or with one process, nothing here happens.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from fewstep.system.errors import SettingsError
from fewstep.system.interrupt import INTERRUPTED, handling

__all__ = ["default_processes", "launched", "leave", "orphaned", "relaunch"]


# glibc gives large blocks back to the kernel at once and takes page faults to get them again: keeping them made an
# update of a small transformer a third faster (LOG.md).
PER_PROCESS = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "67108864",
}


EXPLAINED = 1  # exit code after an error with a one-line message
UNEXPLAINED = 3  # exit code of a worker process after any other error
PATIENCE, AT_ONCE = 30.0, 2.0  # seconds for processes to stop, and after a second Ctrl-C
PARENT = "FEWSTEP_PARENT"  # environment: the process that started this one


def orphaned() -> bool:
    """Return whether the launcher of this process is gone (killed) and can no longer forward signals."""
    return os.environ.get(PARENT, str(os.getppid())) != str(os.getppid())


def launched() -> bool:
    """Return whether this process was started by `relaunch`, which acknowledges signals for all processes."""
    return PARENT in os.environ


def leave(code: int) -> NoReturn:
    """End a worker process with an exit code, after everything is closed and printed, without Python's shutdown.

    If networks are split, Gloo's threads outlive `destroy_process_group`. One that frees a tensor during the shutdown aborts
    the process (pytorch/pytorch#190489), so a finished run would seem to fail.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def default_processes(cuda: bool) -> int:
    """Number of processes for `auto`: one per core without a GPU (at most eight), else one; on Windows one."""
    if cuda or sys.platform == "win32":
        return 1
    return min(8, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)


def relaunch(
    arguments: Sequence[str], processes: int, answer: str = "stopping; press Ctrl-C again to quit at once"
) -> int:
    """Run `fewstep ARGUMENTS` in `processes` connected processes; returns the exit code.

    SIGINT and SIGTERM are acknowledged and forwarded to all of them; a second signal ends them within seconds. If one
    process fails, the others are stopped.

    Args:
        arguments: the command's arguments.
        processes: number of processes.
        answer: reply to a first signal.

    Raises:
        SettingsError: this system cannot start several processes from one command.
    """
    if sys.platform == "win32":
        raise SettingsError(
            f"`--processes` must be 1 on this system (more need Linux, macOS or WSL), got {processes}. Try: --processes 1"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    common[PARENT] = str(os.getpid())
    # an error in every process is shown once, by process 0; others' output is kept in case theirs came first
    messages = [None, *(tempfile.TemporaryFile() for _ in range(1, processes))]  # noqa: SIM115
    children: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        # a raw write: a signal may interrupt another print, and printing is not reentrant
        os.write(2, f"\n{answer if len(received) == 1 else 'quitting at once'}\n".encode())
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    first_failed = 0
    with handling(forward):
        try:
            for rank in range(processes):
                children.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "fewstep", *arguments],
                        stderr=messages[rank],
                        env={**PER_PROCESS, **os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        start_new_session=True,  # a terminal's Ctrl-C reaches them only through this process
                    )
                )
                if received:  # otherwise the others would wait for processes that never start
                    children[-1].send_signal(received[-1])
                    break
            while any(child.poll() is None for child in children):
                failed = [rank for rank, child in enumerate(children) if child.poll() not in (None, 0)]
                if failed or len(received) > 1:
                    first_failed = failed[0] if failed else 0
                    _stop(children, lambda: len(received) > 1)
                time.sleep(0.1)
        finally:
            _stop(children, lambda: len(received) > 1)
    # prefer the process that can name the cause over those that only lost a peer
    telling = next((rank for rank, child in enumerate(children) if child.returncode == EXPLAINED), first_failed)
    message, code = messages[telling], children[telling].returncode
    interrupted = bool(received) and code not in (0, EXPLAINED)  # whatever their exit codes
    if message is not None and code != INTERRUPTED and not interrupted:
        message.seek(0)
        sys.stderr.buffer.write(message.read())
    if interrupted:
        return INTERRUPTED
    if code == EXPLAINED:
        return EXPLAINED
    return next(
        (child.returncode for child in children if child.returncode > 0),
        next((child.returncode for child in children if child.returncode), 0),
    )


def _stop(children: list[subprocess.Popen[bytes]], at_once: Callable[[], bool]) -> None:
    """Give the other processes time to stop (a signal stops them one after another), then end them.

    `at_once`: returns whether the time is short; it may change while waiting.
    """
    began = time.monotonic()
    while any(child.poll() is None for child in children):
        if time.monotonic() - began > (AT_ONCE if at_once() else PATIENCE):
            break
        time.sleep(0.1)
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()
