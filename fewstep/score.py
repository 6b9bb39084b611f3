"""Scoring a sampler: seeds -> images -> metrics, with the protocol beside every number."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fewstep.evaluate import METRICS, Metric, Reference, evaluate
from fewstep.features import Extractor
from fewstep.sample import Sampler, generate
from fewstep.teachers.base import ClassLabels

__all__ = ["Scorer"]


class Scorer:
    """Makes samples of seeds 0 .. samples - 1, classes balanced, and measures them.

    Args:
        reference: statistics of the real images.
        extractor: what they were made with.
        samples: how many to make.
        metrics: which to compute.
        batch: samples at a time.
        bf16: autocast the network.
    """

    def __init__(
        self,
        reference: Reference,
        extractor: Extractor,
        samples: int,
        metrics: tuple[Metric, ...] = METRICS,
        batch: int = 250,
        bf16: bool = False,
    ) -> None:
        self.reference, self.extractor, self.samples = reference, extractor, samples
        self.metrics, self.batch, self.bf16 = metrics, batch, bf16

    def score(
        self,
        sampler: Sampler,
        shape: tuple[int, ...],
        conditioner: ClassLabels,
        device: torch.device | str = "cpu",
        progress: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Any]:
        """Metrics, protocol, images per second (of sampling alone) and network calls per image, ready for JSON."""
        spent = 0.0

        def timed() -> Any:
            nonlocal spent
            batches = generate(
                sampler,
                range(self.samples),
                shape,
                conditioner,
                batch=self.batch,
                bf16=self.bf16,
                device=device,
                progress=progress,
            )
            while True:
                started = time.perf_counter()
                images = next(batches, None)
                spent += time.perf_counter() - started
                if images is None:
                    return
                yield images

        scores = evaluate(timed(), self.reference, self.extractor, metrics=self.metrics)
        self.images_per_second = self.samples / spent
        values = {name: value for name, value in scores.as_dict().items() if value is not None}
        values["warnings"] = "; ".join(scores.warnings) or None
        return values | {"calls": sampler.calls}
