"""Time of an iteration on given GPUs, and the times of the papers' programs. Only arithmetic; knows no network.

Every assumption is a constant here, and is printed with the results.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "BUS",
    "EFFICIENCY",
    "GPUS",
    "HOST",
    "PER_MACHINE",
    "REACHED",
    "WRITING",
    "Gpu",
    "Messages",
    "Offloading",
    "Published",
    "Step",
    "published",
]


@dataclass(frozen=True)
class Gpu:
    """A GPU's specification, as stated by its vendor.

    Attributes:
        memory: GiB.
        operations: dense bfloat16 operations per second.
        wide: the same in TF32.
        exact: the same in float32.
        near: bytes per second sent to the other GPUs of the machine (NVLink; PCIe for the RTX 4090).
        far: bytes per second sent by a machine of eight GPUs to the others: 200 Gbit/s per GPU for the A100, 400 for the
            H100, 25 per machine for the RTX 4090.
    """

    memory: int
    operations: float
    wide: float
    exact: float
    near: float
    far: float

    def rate(self, bf16: bool, exact: bool = False) -> float:
        """Operations per second in bfloat16, else in TF32, or in float32 if `exact`."""
        return self.operations if bf16 else self.exact if exact else self.wide


GPUS = {
    "RTX 4090": Gpu(24, 165e12, 83e12, 83e12, 32e9, 3e9),
    "A100": Gpu(80, 312e12, 156e12, 19.5e12, 300e9, 200e9),
    "H100": Gpu(80, 989e12, 495e12, 67e12, 450e9, 400e9),
}
PER_MACHINE = 8  # GPUs of a machine
EFFICIENCY = 0.4  # achieved share of the stated operations, for convolutions and attention
REACHED = 0.7  # achieved share of the stated bandwidth, for large messages
WRITING = 1e9  # bytes per second for writing a checkpoint
BUS = 20e9  # bytes per second between a GPU and host memory (PCIe 4 x16, of 32e9 stated)
HOST = 100e9  # bytes per second of memory traffic of an optimizer on the host


@dataclass(frozen=True)
class Messages:
    """Messages that one process sends in an iteration.

    Attributes:
        near: bytes within one machine.
        far: bytes in groups across machines, whose GPUs share the machine's network.
        hidden: whether they overlap with computation (FSDP's do; averaging of whole gradients follows the backward pass).
    """

    near: float = 0.0
    far: float = 0.0
    hidden: bool = False

    @classmethod
    def averaging(cls, size: float, processes: int) -> Messages:
        """Messages of a ring all-reduce of `size` bytes: everything is sent almost twice."""
        sent = 2 * size * (processes - 1) / processes
        return cls(near=sent) if processes <= PER_MACHINE else cls(far=sent)

    @classmethod
    def splitting(cls, gathered: float, scattered: float, shard: int, replicate: int) -> Messages:
        """Weights of `gathered` bytes put together and gradients of `scattered` bytes summed and split again among `shard`
        processes, then averaged over `replicate` groups of them."""
        within = (gathered + scattered) * (shard - 1) / shard
        across = 2 * scattered * (replicate - 1) / replicate
        one_machine = shard * replicate <= PER_MACHINE
        near = (within if shard <= PER_MACHINE else 0.0) + (across / shard if one_machine else 0.0)
        # every machine has the whole network if a group fits into it, else PER_MACHINE of its parts
        far = (within if shard > PER_MACHINE else 0.0) + (
            0.0 if one_machine else across * min(1.0, PER_MACHINE / shard)
        )
        return cls(near, far, hidden=True)


@dataclass(frozen=True)
class Step:
    """An iteration on one kind of GPU: seconds of computing, of messages, and in total with the host's."""

    computing: float
    messages: float
    seconds: float

    @classmethod
    def on(
        cls,
        gpu: Gpu,
        operations: float,
        messages: Sequence[Messages],
        bf16: bool = True,
        host: float = 0.0,
        exact: bool = False,
        overlapped: float = 0.0,
    ) -> Step:
        """`operations`, `messages` and seconds at the `host`: of one process in an iteration; without `bf16` in TF32, or in
        float32 if `exact`. `overlapped` seconds on the bus overlap with computation."""
        computing = operations / (gpu.rate(bf16, exact) * EFFICIENCY)
        hidden, open_ = (
            sum(m.near / gpu.near + m.far / gpu.far for m in messages if m.hidden is which) / REACHED
            for which in (True, False)
        )
        return cls(computing, hidden + open_, max(computing, hidden, overlapped) + open_ + host)


@dataclass(frozen=True)
class Offloading:
    """Bytes that `train.offload` and `train.swap_blocks` move between a GPU and its host.

    Attributes:
        memory: bytes in the host's memory.
        moved: bytes over the bus in an iteration.
        touched: bytes that the optimizers on the host read and write in an iteration.
        blocks: bytes of the frozen network's blocks in the host's memory.
        swapped: bytes of blocks that come over the bus in an iteration, while the network computes.
    """

    memory: float = 0.0
    moved: float = 0.0
    touched: float = 0.0
    blocks: float = 0.0
    swapped: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of an iteration in which the GPU waits."""
        return self.moved / BUS + self.touched / HOST

    @property
    def overlapped(self) -> float:
        """Seconds of an iteration in which blocks are on their way."""
        return self.swapped / BUS


@dataclass(frozen=True)
class Published:
    """Figures of the published run that a recipe reproduces, from its header."""

    gpus: int
    batch: int
    iterations: float
    hours: float

    @property
    def seconds(self) -> float:
        """Seconds per iteration."""
        return self.hours * 3600 / self.iterations


def published(recipe: str) -> Published | None:
    """Find the published run in a recipe's header, if it states the duration."""
    found = re.search(r"(\d+) GPUs x (\d+), ([\d.]+)k iterations, ([\d.]+) hours", recipe)
    return Published(int(found[1]), int(found[2]), 1000 * float(found[3]), float(found[4])) if found else None
