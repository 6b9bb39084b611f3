"""Score a sampler: seeds -> images -> metrics, with the protocol of every number."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fewstep.evaluation.agreement import RIVALS, agreement, chroma, diversity
from fewstep.evaluation.extractor import Extractor
from fewstep.evaluation.features import Clip
from fewstep.evaluation.metrics import MEASURES, METRICS, Metric
from fewstep.evaluation.reference import Reference, StreamingStats
from fewstep.evaluation.resize import resized
from fewstep.evaluation.scores import check_metrics, evaluate, frechet_distance, singular
from fewstep.students.sample import Sampler, generate
from fewstep.system.errors import EvaluationError
from fewstep.teachers.base import Conditioner

__all__ = ["Scorer", "scored"]


class Scorer:
    """Scores samples of seeds 0 .. samples - 1 with balanced classes; each repetition uses the next `samples` seeds.

    Args:
        reference: statistics of the real images.
        extractor: the reference's extractor.
        samples: number of samples.
        metrics: metrics to compute.
        batch: samples per batch.
        bf16: autocast the network.
        repeat: number of repetitions with different seeds; metrics are then means with standard deviations.
        clip: a CLIP model, for CLIP score, retrieval and diversity.
        side: first resize square pictures to this size in pixels (Lanczos); None: unchanged.
        patches: reference and extractor of patch FID, measured on the same pictures at their own size.

    Raises:
        EvaluationError: a metric that cannot be measured, too few samples, or a batch or repetitions below 1.
    """

    VARIANTS = 8  # pictures per caption that are compared with each other
    CAPTIONS = 64  # captions with that many pictures; fewer if these exceed a quarter of the samples

    def __init__(
        self,
        reference: Reference,
        extractor: Extractor,
        samples: int,
        metrics: tuple[Metric, ...] = METRICS,
        batch: int = 250,
        bf16: bool = False,
        repeat: int = 1,
        clip: Clip | None = None,
        side: int | None = None,
        patches: tuple[Reference, Extractor] | None = None,
    ) -> None:
        self.reference, self.extractor, self.samples = reference, extractor, samples
        self.metrics, self.batch, self.bf16, self.repeat = metrics, batch, bf16, repeat
        self.clip, self.side, self.patches = clip, side, patches
        for name, value in (("batch", batch), ("repeat", repeat)):
            if value < 1:
                raise EvaluationError(f"`{name}` must be at least 1, got {value}. Try: 1")
        check_metrics(metrics, extractor, samples)
        if patches is not None and samples < 2:
            raise EvaluationError(f"`samples` must be at least 2 for patch FID, got {samples}. Try: 10000")
        self.seen = "uint8" if side is None else f"lanczos{side}-uint8"

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of the references, by setting."""
        known = {"evaluation.reference": self.reference.fingerprint}
        return known if self.clip is None else known | {"evaluation.clip": self.clip.sha256}

    def score(
        self,
        sampler: Sampler,
        shape: tuple[int, ...],
        conditioner: Conditioner,
        device: torch.device | str = "cpu",
        progress: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Any]:
        """Compute metrics, protocol, images per second (of sampling alone) and network calls per image, ready for JSON.

        `warnings` is a list of caveats about the numbers.

        Raises:
            SettingsError: samples that are not finite.
            EvaluationError: pictures that cannot be measured.
        """
        spent, judging = 0.0, self.clip is not None
        if judging and not conditioner.names:
            raise EvaluationError("`evaluation.clip` must be left out for a model without captions")

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

        each: list[dict[str, Any]] = []
        for start in range(0, self.repeat * self.samples, self.samples):
            captions = [conditioner.names[(start + i) % conditioner.num_classes] for i in range(self.samples * judging)]
            each.append(self._measured(timed(start), captions))
            if self.clip is not None:
                each[-1]["diversity"] = self._diversity(sampler, shape, conditioner, start, device)
        self.images_per_second = self.repeat * self.samples / spent
        values = {name: value for name, value in each[0].items() if value is not None}
        values["warnings"] = list(dict.fromkeys(text for scores in each for text in scores["warnings"]))
        values |= self.identity
        if self.repeat > 1:
            values["repeat"] = self.repeat
            for metric in (column.key for column in MEASURES):
                if metric in values:
                    numbers = [scores[metric] for scores in each]
                    spread = {f"{metric}_each": numbers, f"{metric}_spread": statistics.stdev(numbers)}
                    values |= {metric: statistics.fmean(numbers), **spread}
        return values | {"calls": sampler.calls}

    @property
    def identity(self) -> dict[str, str]:
        """Protocols of a row's other numbers, by their entry."""
        found = {}
        if self.patches is not None:
            found["patch_protocol"] = f"{self.patches[0].id}/{self.samples}/uint8"
        if self.clip is not None:
            found["judge"] = self.clip.id
        return found

    def _measured(self, batches: Iterator[Tensor], captions: list[str]) -> dict[str, Any]:
        """Compute all numbers of one set of pictures, in one pass over it."""
        judged: list[Tensor] = []
        colours: list[float] = []
        patches = StreamingStats(self.patches[1].dim) if self.patches else None

        def shown() -> Iterator[Tensor]:
            for images in batches:
                if self.clip is not None:  # both at the pictures' own size
                    judged.append(self.clip(images))
                    colours.extend([chroma(images)] * len(images))
                if self.patches is not None and patches is not None:
                    patches.update(self.patches[1](images))
                yield images if self.side is None else resized(images, self.side)

        scores = evaluate(shown(), self.reference, self.extractor, metrics=self.metrics, seen=self.seen)
        values = scores.as_dict()
        if self.patches is not None and patches is not None:
            real = self.patches[0]
            values["patch_fid"] = frechet_distance(patches.mu(), patches.sigma(), real.mu, real.sigma)
            values["warnings"] += singular("patch FID", patches.n, real.n, len(real.mu))
        if self.clip is not None:
            rivals = len(set(captions)) - 1
            if rivals < RIVALS:
                values["warnings"].append(
                    f"retrieval among {rivals + 1} captions instead of {RIVALS + 1}: too few captions"
                )
            values |= agreement(self.clip, torch.cat(judged), captions) | {"chroma": sum(colours) / len(colours)}
        return values

    def _diversity(
        self, sampler: Sampler, shape: tuple[int, ...], conditioner: Conditioner, start: int, device: torch.device | str
    ) -> float:
        """Measure the diversity of `VARIANTS` pictures for each of up to `CAPTIONS` evenly spaced captions."""
        assert self.clip is not None
        count = max(1, min(self.CAPTIONS, conditioner.num_classes, self.samples // (4 * self.VARIANTS)))
        chosen = torch.arange(count) * conditioner.num_classes // count
        seeds = range(start, start + count * self.VARIANTS)
        pictures = generate(
            sampler, seeds, shape, conditioner, labels=chosen.repeat_interleave(self.VARIANTS), batch=self.batch,
            bf16=self.bf16, device=device,
        )  # fmt: skip
        return diversity(torch.cat([self.clip(part) for part in pictures]).unflatten(0, (count, self.VARIANTS)))


def scored(
    scorer: Any,
    watch: Callable[[str], None],
    sampler: Sampler,
    shape: tuple[int, ...],
    conditioner: Conditioner,
    device: torch.device,
) -> dict[str, Any]:
    """Score with a `Scorer` or any object with a method `score`.

    A `Scorer` reports its progress to `watch`. Other objects receive only sampler, shape, conditioner and device.
    """
    if not isinstance(scorer, Scorer):
        found: dict[str, Any] = scorer.score(sampler, shape, conditioner, device)
        return found
    samples = scorer.samples
    return scorer.score(
        sampler, shape, conditioner, device, lambda done: watch(f"evaluating, {done:,} of {samples:,} samples")
    )
