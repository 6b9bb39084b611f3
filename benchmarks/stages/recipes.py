"""Whole runs of the small recipes, as `fewstep distill` does them."""

from __future__ import annotations

import time

from benchmarks.stages.bench import Bench
from fewstep.run.execute import execute
from fewstep.run.settings import load_run

__all__ = ["run"]


def run(bench: Bench, recipe: str, seed: int) -> None:
    """One recipe to its end with one seed: its scores, and how long it took."""
    made = load_run(f"fashion-mnist/{recipe}")
    train = {"seed": seed, "device": bench.device.type}
    scored = {}
    if bench.tiny:
        train |= {"images": 16, "batch_size": 8, "evaluate_every": None}
        scored = {"samples": 20}
    made = made.model_copy(
        update={
            "train": made.train.model_copy(update=train),
            "evaluation": made.evaluation.model_copy(update=scored),
        }
    )
    started = time.perf_counter()
    scores = execute(made, bench.scratch(recipe))
    bench.found("s", whole_run=time.perf_counter() - started)
    bench.report("", {name: value for name, value in scores.items() if isinstance(value, int | float)})
