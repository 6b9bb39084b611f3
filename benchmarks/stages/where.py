"""The time of an iteration by phase, the device's share, and the largest kernels."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.stages.bench import Bench
from benchmarks.stages.training import Cycle, built
from fewstep.training.ema import Ema
from fewstep.training.optim import Stepper

__all__ = ["adm", "sdxl"]

LARGEST = 8


def sdxl(bench: Bench) -> None:
    """SDXL's LoRA, one sample a forward."""
    _where(bench, "sdxl", "micro-batch 1")


def adm(bench: Bench) -> None:
    """ImageNet-64's ADM with a GAN head."""
    _where(bench, "others", "imagenet-64/dmd2, 40 images a card")


def _where(bench: Bench, stage: str, name: str) -> None:
    run, task = built(bench, stage, name)
    cycle = Cycle(bench, run, task)
    cycle.warm()

    def both() -> None:
        cycle.update(True, 1)
        cycle.update(False, 1)

    plain = bench.seconds(both, repeats=3, warm=1)
    spent, total = _phases(bench, both, task)
    shares = {phase: 100 * seconds / total for phase, seconds in spent.items()}
    bench.report("% of two updates", shares | {"everything else": 100 - sum(shares.values())})
    bench.report("s for two updates", {"as they run": plain, "with a wait around each phase": total})
    _kernels(bench, both)


def _phases(bench: Bench, work: Callable[[], None], task: Any) -> tuple[dict[str, float], float]:
    """Seconds of each phase of `work`, with a wait for the device before and after it; and of all."""
    spent: dict[str, float] = defaultdict(float)

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            bench.synchronise()
            started = time.perf_counter()
            result = function(*args, **options)
            bench.synchronise()
            spent[phase] += time.perf_counter() - started
            return result

        return run

    places = [
        ("rollouts", type(task), "_rollout"),
        ("forward for the student", type(task.objective), "generator_loss"),
        ("forward for the fake score", type(task.objective), "critic_loss"),
        ("backward", torch.Tensor, "backward"),
        ("optimizer", Stepper, "step"),
        ("average", Ema, "update"),
        ("data and conditions", type(task), "_batch"),
    ]
    with ExitStack() as stack:
        for phase, owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, timed(phase, getattr(owner, name))))
        bench.synchronise()
        started = time.perf_counter()
        work()
        bench.synchronise()
        return dict(spent), time.perf_counter() - started


def _kernels(bench: Bench, work: Callable[[], None]) -> None:
    """The device's busy share of the time, and the largest kernels' shares of that."""
    which = ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU
    bench.synchronise()
    with profile(activities=[which]) as seen:
        started = time.perf_counter()
        work()
        bench.synchronise()
        wall = time.perf_counter() - started
    of = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    found = sorted(((getattr(event, of), event.key) for event in seen.key_averages()), reverse=True)
    total = sum(micros for micros, _ in found)
    bench.report("%", {"device busy": 100 * total / 1e6 / wall} if bench.cuda else {})
    for number, (micros, kernel) in enumerate(found[:LARGEST], 1):
        bench.note(f"{number}. {100 * micros / total:.1f} % {kernel[:90]}")
