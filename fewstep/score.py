"""Scoring a sampler: seeds -> images -> metrics, with the protocol beside every number."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fewstep.evaluate import METRICS, Metric, Reference, evaluate
from fewstep.features import Extractor
from fewstep.sample import Sampler, generate
from fewstep.teachers.base import Conditioner

__all__ = ["Scorer"]


class Scorer:
    """Makes samples of seeds 0 .. samples - 1, classes balanced, and measures them; the next `samples` seeds if repeated.

    Args:
        reference: statistics of the real images.
        extractor: what they were made with.
        samples: how many to make.
        metrics: which to compute.
        batch: samples at a time.
        bf16: autocast the network.
        repeat: how often, each time with other seeds; metrics are then means, with their standard deviations.
    """

    def __init__(
        self,
        reference: Reference,
        extractor: Extractor,
        samples: int,
        metrics: tuple[Metric, ...] = METRICS,
        batch: int = 250,
        bf16: bool = False,
        repeat: int = 1,
    ) -> None:
        self.reference, self.extractor, self.samples = reference, extractor, samples
        self.metrics, self.batch, self.bf16, self.repeat = metrics, batch, bf16, repeat

    def score(
        self,
        sampler: Sampler,
        shape: tuple[int, ...],
        conditioner: Conditioner,
        device: torch.device | str = "cpu",
        progress: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Any]:
        """Metrics, protocol, images per second (of sampling alone) and network calls per image, ready for JSON."""
        spent = 0.0

        def timed(start: int) -> Iterator[Tensor]:
            nonlocal spent
            batches = generate(
                sampler,
                range(start, start + self.samples),
                shape,
                conditioner,
                batch=self.batch,
                bf16=self.bf16,
                device=device,
                progress=lambda done: progress(start + done),
            )
            while True:
                started = time.perf_counter()
                images = next(batches, None)
                spent += time.perf_counter() - started
                if images is None:
                    return
                yield images

        starts = range(0, self.repeat * self.samples, self.samples)
        each = [evaluate(timed(start), self.reference, self.extractor, metrics=self.metrics) for start in starts]
        self.images_per_second = self.repeat * self.samples / spent
        values = {name: value for name, value in each[0].as_dict().items() if value is not None}
        values["warnings"] = "; ".join(each[0].warnings) or None
        if self.repeat > 1:
            values["repeat"] = self.repeat
            for metric in self.metrics:
                if metric in values:
                    numbers = [getattr(scores, metric) for scores in each]
                    spread = {f"{metric}_each": numbers, f"{metric}_spread": statistics.stdev(numbers)}
                    values |= {metric: statistics.fmean(numbers), **spread}
        return values | {"calls": sampler.calls}
