"""Memory and time of a run's iterations, and what `plan` says of them."""

from __future__ import annotations

import statistics
import time
from typing import Any, cast
from unittest import mock

import torch

from benchmarks.stages.bench import Bench
from benchmarks.stages.networks import distillation, outline, random_teacher
from benchmarks.stages.variants import VARIANTS
from fewstep.costs.machines import GPUS
from fewstep.costs.plan import plan
from fewstep.networks.diffusers_net import DiffusersNet
from fewstep.run.settings import load_run
from fewstep.run.specs import DistillRun
from fewstep.system.device import training_kernels
from fewstep.teachers import DiffusersTeacher
from fewstep.training.distill import Distillation
from fewstep.training.task import Micro

__all__ = ["Cycle", "built", "measured", "planned", "run_of"]

GIB = 2**30
CARDS = (24, 16, 12)  # GiB of cards that people have


def run_of(stage: str, name: str, tiny: bool, device: str) -> DistillRun:
    """The run of a variant, its settings applied to its recipe; tiny: two images a forward."""
    variant = VARIANTS[stage, name]
    values = load_run(variant["recipe"]).model_dump(mode="json")
    settings: dict[str, Any] = {"evaluation.samples": 0, "train.device": device} | variant["settings"]
    for path, value in settings.items():
        *parents, key = path.split(".")
        inner = values
        for parent in parents:
            inner = inner[parent]
        inner[key] = value
    if tiny:
        train = values["train"]
        several = train["batch_size"] > (train["micro_batch"] or train["batch_size"])
        train["micro_batch"], train["batch_size"] = 2, 4 if several else 2
        train["swap_blocks"] = min(train["swap_blocks"], 1)
        for player in (values["generator"], values["critic"]):
            if player["lora"]:
                player["lora"]["rank"] = 4
    return DistillRun.model_validate(values)


def built(bench: Bench, stage: str, name: str) -> tuple[DistillRun, Distillation]:
    """The variant's run and its task, with a random teacher on the device."""
    run = run_of(stage, name, bench.tiny, bench.device.type)
    dtype = getattr(torch, run.teacher.dtype) if isinstance(run.teacher, DiffusersTeacher) else torch.float32
    teacher = random_teacher(VARIANTS[stage, name]["network"], bench.tiny, bench.device, dtype)
    if isinstance(run.teacher, DiffusersTeacher) and run.teacher.quantize is not None:
        cast(DiffusersNet, teacher.denoiser.net).quantize(run.teacher.quantize)
    return run, distillation(run, teacher)


class Cycle:
    """A run's updates, each of a kind that is chosen: with or without the generator's turn, in so many steps.

    The trainer draws the number of steps anew in every iteration, so that a mean over few iterations would say little.

    Args:
        bench: the device.
        run: the run.
        task: its task.
    """

    def __init__(self, bench: Bench, run: DistillRun, task: Distillation) -> None:
        self.bench, self.run, self.task = bench, run, task
        self.steps = task.nets.generator.steps
        self.every = run.objective.critic_steps if run.objective.needs_critic else 1

    def update(self, turn: bool, steps: int, micros: int | None = None) -> dict[str, Any]:
        """One update; `micros` forwards of a micro-batch instead of the run's number."""
        run, task = self.run, self.task
        size, count = run.train.micro()
        first = 0 if turn else run.train.batch_size  # the generator's turn is told by the images that were seen
        parts = [Micro(first + i * size, size, run.train.seed) for i in range(micros or count)]
        with (
            training_kernels(task.device, run.train.bf16(), run.train.precision == "tf32"),
            mock.patch.object(task, "steps", return_value=steps),
        ):
            return task.update(first, parts)

    def warm(self) -> None:
        """Both kinds once, as deep as they go: kernels are chosen, optimizer states are there."""
        self.update(True, self.steps, 1)
        if self.every > 1:
            self.update(False, self.steps, 1)

    def seconds(self) -> float:
        """Return the mean seconds of an iteration over a cycle of generator updates.

        Its time is linear in the number of steps, so that the mean of the first and the last is that of all.
        """
        steps = sorted({1, self.steps})
        turn = statistics.mean(self._timed(True, count) for count in steps)
        if self.every == 1:
            return turn
        return (turn + (self.every - 1) * statistics.mean(self._timed(False, count) for count in steps)) / self.every

    def _timed(self, turn: bool, steps: int) -> float:
        self.bench.synchronise()
        started = time.perf_counter()
        self.update(turn, steps)
        self.bench.synchronise()
        return time.perf_counter() - started


def measured(bench: Bench, stage: str, name: str) -> None:
    """Peak memory, seconds an iteration; for SDXL's LoRA as shipped, on which cards it runs."""
    if "8 bits" in name and not bench.installed("torchao"):
        return
    if "NF4" in name and not bench.installed("bitsandbytes"):
        return
    run, task = built(bench, stage, name)
    cycle = Cycle(bench, run, task)
    if bench.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    cycle.warm()
    if bench.cuda:  # before the times: if they fail, this is known
        bench.found("GiB", memory=torch.cuda.max_memory_allocated() / GIB)
    seconds = cycle.seconds()
    bench.found("s an iteration", time=seconds)
    bench.found("images an iteration", batch=run.train.batch_size)
    if bench.cuda:
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        bench.found(
            "GiB",
            memory=torch.cuda.max_memory_allocated() / GIB,
            reserved=torch.cuda.max_memory_reserved() / GIB,
            outside_of_torch=outside / GIB,
        )
        if name.endswith("as shipped"):
            _fits(bench, cycle, outside, total)


def _fits(bench: Bench, cycle: Cycle, outside: int, total: int) -> None:
    """Run an iteration within the memory of smaller cards, less what the driver takes."""
    for card in (size for size in CARDS if size * GIB - outside <= total):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((card * GIB - outside) / total)
        try:
            cycle.update(True, cycle.steps, 1)
            cycle.update(False, cycle.steps, 1)
        except torch.OutOfMemoryError:
            bench.note(f"does not run in {card} GiB")
            return
        bench.note(f"runs in {card} GiB")


def planned(bench: Bench, stage: str, name: str) -> None:
    """Return the figures of `fewstep plan` for the same run: memory, operations, seconds on the GPUs that it knows."""
    run = run_of(stage, name, bench.tiny, "cpu")
    network = outline(VARIANTS[stage, name]["network"], bench.tiny)
    with mock.patch.object(type(run.teacher), "outline", lambda self: network):
        found = plan(run)
    bench.found("GiB", name, planned_memory=found.memory / GIB)
    bench.found("TFLOP an iteration", name, work=found.work.iteration * found.batch / 1e12)
    times = {f"time on {card}": found.step(gpu).seconds for card, gpu in GPUS.items()}
    bench.report("s an iteration", times, name)
