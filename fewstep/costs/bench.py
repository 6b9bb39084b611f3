"""What an iteration costs, measured: calls of each network, floating-point operations, time and memory. Trains nothing
that is kept.

The operations are counted by torch and divided by those of one forward of the teacher, which gives the F in which
`Objective.passes` and the papers' tables count; so a count that is wrong shows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fewstep.run.specs import DistillRun
from fewstep.system import distributed
from fewstep.system.device import hardware, training_kernels
from fewstep.training.distill import Distillation
from fewstep.training.task import Micro

__all__ = ["Cost", "measure"]


@dataclass(frozen=True)
class Cost:
    """One iteration's share, averaged over whole cycles of the generator's turns."""

    calls: dict[str, tuple[float, float]]
    """Network -> forwards an image, and those that ended at the bottleneck."""
    passes: float
    """Operations of an iteration in forwards of the teacher, F."""
    counted: float
    """The same by `Objective.passes`."""
    forward: float
    """Operations of one forward of the teacher, an image (multiplications and additions)."""
    images_per_second: float
    """All processes together; evaluation, pictures and checkpoints not included."""
    memory: int | None
    """Bytes: on a GPU the most that was allocated, else the most this process ever held; None: not known on Windows."""
    where: str
    """Hardware and precision."""

    def __str__(self) -> str:
        calls = ", ".join(
            f"{name} {whole:.3g}" + (f" + {part:.3g} to the bottleneck" if part else "")
            for name, (whole, part) in self.calls.items()
        )
        memory = (
            "not measured on Windows" if self.memory is None else f"{self.memory / 2**20:,.0f} MiB at most, a process"
        )
        return (
            f"forwards an image: {calls}\n"
            f"passes: {self.passes:.2f} F measured, {self.counted:.2f} F counted; 1 F = {self.forward / 1e6:,.1f} MFLOP an image\n"
            f"speed: {self.images_per_second:,.1f} images/s, {self.passes * self.forward * self.images_per_second / 1e9:,.1f} GFLOP/s\n"
            f"memory: {memory}\n"
            f"on {self.where}"
        )


def measure(run: DistillRun, cycles: int = 3) -> Cost:
    """Build a run, warm up for two of the generator's turns, then time `cycles` and count the operations of one more.

    A cycle is `critic_steps` iterations, for a K-step generator 8 K of them, because each rollout takes a random number
    of steps.

    Raises:
        ValueError: no cycles, or an analytic teacher; or one of its sub-classes, as for training the run.
    """
    if cycles < 1:
        raise ValueError(f"{cycles} cycles take no time: give 1 or more")
    run = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"samples": 0})})
    task = run.trainer(Path("bench")).task
    assert isinstance(task, Distillation)
    steps = task.nets.generator.steps
    cycle = run.objective.critic_steps * (8 * steps if steps > 1 else 1)
    size, count = run.train.micro()
    world = distributed.world_size()
    position = 0

    def iterate(iterations: int) -> None:
        nonlocal position
        for _ in range(iterations):
            first = position + distributed.rank() * size
            micros = [Micro(first + i * world * size, size, run.train.seed) for i in range(count)]
            with training_kernels(task.device, run.train.bf16(), run.train.precision == "tf32"):
                task.update(position, micros)
            position += run.train.batch_size

    if not any(True for _ in task.teacher.denoiser.parameters()):
        raise ValueError(f"teacher {task.teacher.name} is a formula, not a network: there is nothing to count")
    iterate(2 * run.objective.critic_steps)
    _synchronise(task.device)
    started = time.perf_counter()
    iterate(cycles * cycle)
    _synchronise(task.device)
    spent = time.perf_counter() - started
    memory = _peak(task.device)  # read before operations are counted, which takes memory of its own
    with _counted(task) as calls, FlopCounterMode(display=False) as operations:
        iterate(cycle)
    images = cycle * size * count
    forward = _forward(task, size)
    return Cost(
        calls={name: (whole / images, part / images) for name, (whole, part) in calls.items()},
        passes=operations.get_total_flops() / images / forward,
        counted=sum(run.objective.passes(steps).values()),
        forward=forward,
        images_per_second=cycles * cycle * run.train.batch_size / spent,
        memory=memory,
        where=f"{hardware(world)}, {'bf16' if run.train.bf16() else 'fp32'}, {size} images a forward",
    )


@contextmanager
def _counted(task: Distillation) -> Iterator[dict[str, list[int]]]:
    """Counts images of whole forwards, and of those that ended early, of each network."""
    networks: dict[str, nn.Module] = {
        "generator": task.nets.generator.denoiser,
        "teacher": task.teacher.denoiser,
    }
    if task.nets.learned is not None:
        networks["fake score"] = task.nets.critic.denoiser
    calls = {name: [0, 0] for name in networks}
    handles = []
    for name, module in networks.items():

        def begun(module: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            calls[name][1] += len(args[0])

        def done(module: nn.Module, args: tuple[torch.Tensor, ...], out: object, name: str = name) -> None:
            calls[name][0] += len(args[0])
            calls[name][1] -= len(args[0])

        handles += [module.register_forward_pre_hook(begun), module.register_forward_hook(done)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _forward(task: Distillation, size: int) -> float:
    """Operations of one forward of the teacher, an image."""
    x = torch.zeros(size, *task.teacher.shape, device=task.device)
    t = torch.full((size,), 0.5, dtype=torch.float64, device=task.device)
    labels = torch.zeros(size, dtype=torch.int64) if task.teacher.conditioner.num_classes else None
    cond = {name: value.to(task.device) for name, value in task.teacher.conditioner.cond(labels, size).items()}
    with torch.no_grad(), FlopCounterMode(display=False) as operations:
        task.teacher.denoiser(x, t, **cond)
    return operations.get_total_flops() / size


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # which has no such count
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
