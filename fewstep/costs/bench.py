"""Measure the cost of an iteration: calls of each network, floating-point operations, time and memory. Keeps no training.

`fewstep.costs.measure.count` counts operations; `plan` and `--dry-run` use it on networks without storage.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fewstep.costs.measure import Work, middle
from fewstep.costs.measure import count as count_operations
from fewstep.run.specs import DistillRun
from fewstep.system import distributed
from fewstep.system.device import hardware, training_kernels
from fewstep.training.distill import Distillation
from fewstep.training.task import Micro

__all__ = ["Cost", "measure"]


@dataclass(frozen=True)
class Cost:
    """Cost of one iteration, averaged over whole cycles of generator updates."""

    calls: dict[str, tuple[float, float]]
    """Network -> full forwards per image, and those that ended at the bottleneck."""
    work: Work
    """Operations per image."""
    images_per_second: float
    """Speed of all processes together, without evaluation, pictures and checkpoints."""
    memory: int | None
    """Peak bytes: on a GPU of the allocator, else of this process; None: unknown on Windows."""
    where: str
    """Hardware and precision."""

    def __str__(self) -> str:
        calls = ", ".join(
            f"{name} {whole:.3g}" + (f" + {part:.3g} to the bottleneck" if part else "")
            for name, (whole, part) in self.calls.items()
        )
        memory = (
            "not measured on Windows" if self.memory is None else f"{self.memory / 2**20:,.0f} MiB at most per process"
        )
        return (
            f"forwards per image: {calls}\n"
            f"passes: {self.work.passes:.2f} F measured; 1 F = {self.work.forward / 1e6:,.1f} MFLOP per image\n"
            f"speed: {self.images_per_second:,.1f} images/s, {self.work.iteration * self.images_per_second / 1e9:,.1f} GFLOP/s\n"
            f"memory: {memory}\n"
            f"on {self.where}"
        )


def measure(run: DistillRun, cycles: int = 3) -> Cost:
    """Build a run, warm up for two generator updates, then time `cycles` and count the operations of one more.

    A cycle is `critic_steps` iterations; for a K-step generator 8 K such groups, because each rollout takes a random number
    of steps. Counts are means over all numbers of steps (see `count`).

    Raises:
        ValueError: no cycles; or a sub-class of it, as for training the run.
    """
    if cycles < 1:
        raise ValueError(f"`cycles` must be at least 1, got {cycles}")
    run = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"samples": 0})})
    task = run.trainer(Path("bench")).task
    assert isinstance(task, Distillation)
    steps = task.nets.generator.steps
    cycle = run.objective.critic_steps * (8 * steps if steps > 1 else 1)
    size, count = run.train.micro()
    world = distributed.world_size()
    position = middle(task) * run.train.batch_size

    def kernels() -> AbstractContextManager[None]:
        return training_kernels(task.device, run.train.bf16(), run.train.precision == "tf32")

    def iterate(iterations: int) -> None:
        nonlocal position
        for _ in range(iterations):
            first = position + distributed.rank() * size
            micros = [Micro(first + i * world * size, size, run.train.seed) for i in range(count)]
            with kernels():
                task.update(position, micros)
            position += run.train.batch_size

    iterate(2 * run.objective.critic_steps)
    _synchronise(task.device)
    started = time.perf_counter()
    iterate(cycles * cycle)
    _synchronise(task.device)
    spent = time.perf_counter() - started
    memory = _peak(task.device)  # read before counting operations, which takes memory
    calls = _Calls(task)
    work = count_operations(task, size, each=calls.each, kernels=kernels)
    return Cost(
        calls={name: (whole / size, part / size) for name, (whole, part) in calls.means.items()},
        work=work,
        images_per_second=cycles * cycle * run.train.batch_size / spent,
        memory=memory,
        where=f"{hardware(world)}, {'bf16' if run.train.bf16() else 'fp32'}, {size} images per forward",
    )


class _Calls:
    """Images in full and in partial forwards of each network, as means over the iterations of a cycle."""

    def __init__(self, task: Distillation) -> None:
        networks = {"generator": task.nets.generator.denoiser, "teacher": task.teacher.denoiser}
        if task.nets.learned is not None:
            networks["fake score"] = task.nets.critic.denoiser
        self.means = {name: (0.0, 0.0) for name in networks}
        self._counts = {name: [0, 0] for name in networks}
        for name, module in networks.items():
            counts = self._counts[name]

            def begun(_: nn.Module, args: tuple[torch.Tensor, ...], counts: list[int] = counts) -> None:
                counts[1] += len(args[0])

            def done(_: nn.Module, args: tuple[torch.Tensor, ...], out: object, counts: list[int] = counts) -> None:
                counts[0] += len(args[0])
                counts[1] -= len(args[0])

            module.register_forward_pre_hook(begun)
            module.register_forward_hook(done)

    def each(self, share: float) -> None:
        """Add an iteration with this share of the cycle."""
        for name, counts in self._counts.items():
            whole, part = self.means[name]
            self.means[name] = whole + share * counts[0], part + share * counts[1]
            counts[:] = [0, 0]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # no such counter
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
