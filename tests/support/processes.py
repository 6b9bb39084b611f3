"""Child processes for tests. They fork from a server that has imported torch once, so that one more costs little."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fewstep.system.launch import leave

SECONDS = 280  # until the processes count as hanging
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["fewstep.run.specs", "fewstep.training.distill", "fewstep.training.pretrain", "torch._dynamo", "sklearn.datasets"]
)


def start(said: Path, call: Callable[..., int | None], *arguments: object, **variables: str) -> ForkServerProcess:
    """Call a module's function in a new process, with further environment variables.

    Its stderr goes to the file `said`. What it returns is the exit code (None: 0), 1 after an exception.
    """
    process = FORKS.Process(target=_be, args=(said, call, arguments, variables))
    process.start()
    return process


def ranks(call: Callable[..., int | None], *arguments: object, count: int = 2) -> list[str]:
    """Call a module's function in connected processes; returns what each said on stderr.

    The function finds the variables of torchrun and enters `distributed.process_group()` itself.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(count)]
        children = [start(file, call, *arguments, RANK=str(rank), **common) for rank, file in enumerate(files)]
        deadline = time.monotonic() + SECONDS
        for child in children:
            child.join(max(0.0, deadline - time.monotonic()))
        for child in children:
            child.kill()
            child.join()
        said = [file.read_text() if file.exists() else "" for file in files]
    assert [child.exitcode for child in children] == [0] * count, "\n".join(said)
    return said


def _be(said: Path, call: Callable[..., int | None], arguments: tuple[object, ...], variables: dict[str, str]) -> None:
    """The new process, which ends without Python's own way out, as those of `fewstep` do."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        code = call(*arguments)
    except BaseException:
        traceback.print_exc()
        leave(1)
    leave(code or 0)
