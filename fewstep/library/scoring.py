"""Scores of a model against real images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import get_args

import torch

from fewstep.diffusion.guidance import Rule
from fewstep.evaluation.compare import compare
from fewstep.evaluation.features import ExtractorName
from fewstep.evaluation.metrics import METRICS, Metric
from fewstep.evaluation.scores import Scores
from fewstep.library.model import Model, load
from fewstep.library.sampling import Patience, fitting_batch
from fewstep.system.errors import SettingsError

__all__ = ["evaluate"]


def evaluate(
    model: Model | Path | str,
    reference: Path | str | None = None,
    *,
    samples: int = 50_000,
    metrics: Sequence[Metric] = METRICS,
    extractor: ExtractorName = "auto",
    evaluations: int | None = None,
    guidance: Rule | float | None = None,
    batch: int | None = None,
) -> Scores:
    """Score a student or a teacher against real images, as `fewstep eval` does.

    Args:
        model: a model, or what `load` takes.
        reference: a folder or .zip of real images, a statistics file (.npz) or fashion-mnist; None: the model's own, else its
            training images.
        samples: number of generated pictures, of seeds 0, 1, ...
        metrics: of fid, kid, precision, recall, isc, density, coverage.
        extractor: auto, inception, small or pixels. Scores of different extractors are not comparable.
        evaluations: network calls of a teacher; None: 35.
        guidance: a teacher's classifier-free guidance: a scale, or a rule of `fewstep.diffusion.guidance`.
        batch: pictures per batch; None: by the size of a picture.

    Returns:
        The scores with their protocol and warnings; `scores.fid` is None if it was not asked for.

    Raises:
        EvaluationError, SettingsError: no reference, too few samples, an extractor whose weights are missing.
    """
    if extractor not in get_args(ExtractorName) or extractor == "clip":
        raise SettingsError(f"`extractor` must be auto, inception, small or pixels, got {extractor!r}. Try: 'pixels'")
    found = model if isinstance(model, Model) else load(model)
    candidate = found.candidate(evaluations, guidance)
    with Patience(f"evaluate {found.name}", samples) as patience:
        row = compare(
            [candidate], samples, reference=None if reference is None else str(reference), extractor=extractor,
            metrics=tuple(metrics), batch=fitting_batch(found.picture_shape) if batch is None else batch,
            bf16=found.dtype is torch.bfloat16, device=found.device, progress=lambda name, done: patience.update(done),
        )[0]  # fmt: skip
    names = {field.name for field in fields(Scores)}
    return Scores(**{name: value for name, value in row.items() if name in names} | {
        "n": samples, "protocol": str(row["protocol"]), "warnings": tuple(row["warnings"]),
    })  # fmt: skip
