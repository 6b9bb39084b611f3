"""Several processes on one machine from one command: on CPUs, one single-threaded process a core is the fastest.

Two threads in one process meet at a barrier in every operation; two processes meet once an update, for the gradients.
Under torchrun, or with one process, nothing here happens.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["default_processes", "leave", "orphaned", "relaunch"]


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
INTERRUPTED = 130  # exit code after Ctrl-C
PARENT = "FEWSTEP_PARENT"  # environment: the process that started this one


def orphaned() -> bool:
    """Whether the process that started this one by `relaunch` is gone (killed): nobody would pass signals on any more."""
    return os.environ.get(PARENT, str(os.getppid())) != str(os.getppid())


def leave(code: int) -> NoReturn:
    """End one process of several with an exit code, after all is closed and said, without Python's own way out.

    Gloo's threads outlive `destroy_process_group` wherever networks are split; one that lets go of a tensor while the
    interpreter goes down aborts the process (pytorch/pytorch#190489), and a finished run would end as a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def default_processes(cuda: bool) -> int:
    """How many processes `auto` means: the cores of a machine without a GPU (eight at most), else one."""
    return (
        1 if cuda else min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    )


def relaunch(arguments: Sequence[str], processes: int) -> int:
    """Run `fewstep ARGUMENTS` in `processes` connected processes; returns the exit code.

    SIGINT and SIGTERM go on to all of them; if one fails, the others are stopped.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    common[PARENT] = str(os.getpid())
    # an error that every process meets is shown once, as process 0 tells it; another's is kept until it was the first
    messages = [None, *(tempfile.TemporaryFile() for _ in range(1, processes))]  # noqa: SIM115
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "fewstep", *arguments],
            stderr=messages[rank],
            env={**PER_PROCESS, **os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # a terminal's Ctrl-C reaches them through this process only, once
        )
        for rank in range(processes)
    ]

    def forward(number: int, _frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    first_failed = 0
    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while any(child.poll() is None for child in children):
            failed = [rank for rank, child in enumerate(children) if child.poll() not in (None, 0)]
            if failed:
                first_failed = failed[0]
                _stop(children)
            time.sleep(0.1)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _stop(children)
    # the process that could name the cause, before those that only saw another one vanish
    telling = next((rank for rank, child in enumerate(children) if child.returncode == EXPLAINED), first_failed)
    message = messages[telling]
    if message is not None and children[telling].returncode != INTERRUPTED:
        message.seek(0)
        sys.stderr.buffer.write(message.read())
    if children[telling].returncode == EXPLAINED:
        return EXPLAINED
    return next(
        (child.returncode for child in children if child.returncode > 0),
        next((child.returncode for child in children if child.returncode), 0),
    )


def _stop(children: list[subprocess.Popen[bytes]]) -> None:
    """Give the others a moment to stop by themselves (a signal stops all, one after another), then end them."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(0.1)
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()
