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


EXPLAINED = 1  # exit code after an error that was told in one line
UNEXPLAINED = 3  # exit code of one process of several after anything else
PATIENCE, AT_ONCE = 30.0, 2.0  # seconds given to processes that should stop, and after a second Ctrl-C
PARENT = "FEWSTEP_PARENT"  # environment: the process that started this one


def orphaned() -> bool:
    """Return whether the process that started this one by `relaunch` is gone (killed): nobody would pass signals on any more."""
    return os.environ.get(PARENT, str(os.getppid())) != str(os.getppid())


def launched() -> bool:
    """Return whether this process was started by `relaunch`, which answers signals for all of them."""
    return PARENT in os.environ


def leave(code: int) -> NoReturn:
    """End one process of several with an exit code, after all is closed and said, without Python's own way out.

    Gloo's threads outlive `destroy_process_group` wherever networks are split; one that lets go of a tensor while the
    interpreter goes down aborts the process (pytorch/pytorch#190489), and a finished run would end as a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def default_processes(cuda: bool) -> int:
    """Return the number of processes that `auto` means: the cores of a machine without a GPU (eight at most), else one; on Windows one."""
    if cuda or sys.platform == "win32":
        return 1
    return min(8, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)


def relaunch(arguments: Sequence[str], processes: int, answer: str = "stopping, once more to quit at once") -> int:
    """Run `fewstep ARGUMENTS` in `processes` connected processes; returns the exit code.

    SIGINT and SIGTERM are answered and go on to all of them; a second one ends them within seconds. If one fails, the
    others are stopped.

    Args:
        arguments: of the command.
        processes: how many.
        answer: what a first signal is answered.

    Raises:
        SettingsError: this system cannot start several from one command.
    """
    if sys.platform == "win32":
        raise SettingsError(
            f"--processes {processes}: several processes from one command need Linux, macOS or WSL. Try: --processes 1"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    common[PARENT] = str(os.getpid())
    # an error that every process meets is shown once, as process 0 tells it; another's is kept until it was the first
    messages = [None, *(tempfile.TemporaryFile() for _ in range(1, processes))]  # noqa: SIM115
    children: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        # a raw write: a signal may fall into another one, which printing forbids
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
                        start_new_session=True,  # a terminal's Ctrl-C reaches them through this process only, once
                    )
                )
                if received:  # the others would wait for those that never start
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
    # the process that could name the cause, before those that only saw another one vanish
    telling = next((rank for rank, child in enumerate(children) if child.returncode == EXPLAINED), first_failed)
    message, code = messages[telling], children[telling].returncode
    interrupted = bool(received) and code not in (0, EXPLAINED)  # whatever they died of
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
    """Give the others a moment to stop by themselves (a signal stops all, one after another), then end them.

    `at_once`: the moment is short, also if that is known only later.
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
