"""Settings of the evaluation during a run, and the scorer that they build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from fewstep.data import ImageDataset
from fewstep.evaluation.features import Clip, ExtractorName, extractor_for
from fewstep.evaluation.metrics import Metric
from fewstep.evaluation.reference import find_reference, reference_for
from fewstep.evaluation.scorer import Scorer
from fewstep.system.console import waiting
from fewstep.system.errors import EvaluationError, SettingsError
from fewstep.system.record import Record

__all__ = ["EvaluationSpec"]


class EvaluationSpec(Record):
    """Settings of the evaluation during a run."""

    samples: int = Field(5_000, ge=0)
    """Number of generated images; 0 turns evaluation off."""
    metrics: tuple[Metric, ...] = ("fid",)
    """Metrics to compute: fid, kid, precision, recall, isc (Inception score), density, coverage."""
    extractor: ExtractorName = "auto"
    """Feature extractor; auto chooses by image shape."""
    clip: Path | None = None
    """Folder of a CLIP model: adds CLIP score, retrieval of the caption among 100, diversity for one caption, and chroma; with
    `extractor: clip` it is also the feature extractor."""
    reference: str | None = None
    """Statistics of the real images: an .npz file, a folder or .zip of images, or `fashion-mnist` (shipped). null: computed
    from `data`, else the reference in the teacher's provenance."""
    evaluations: int = Field(35, gt=0)
    """Network evaluations per sample of the teacher (pretraining)."""
    batch: int = Field(250, gt=0)
    """Samples per batch."""

    def scorer(
        self,
        shape: tuple[int, ...],
        dataset: ImageDataset | None,
        provenance: dict[str, Any],
        device: torch.device,
        bf16: bool,
    ) -> Scorer | None:
        """Build the scorer.

        Raises:
            SettingsError: no real images and no statistics.
        """
        if self.samples == 0 or len(shape) != 3:
            return None
        try:
            with waiting("loading the feature extractor"):
                extractor = extractor_for(shape, self.extractor, device, self.clip)
        except EvaluationError as error:
            raise EvaluationError(
                f"the run cannot be scored while it trains: {error} Or train without: --evaluation.samples 0. Or score by pixels, "
                "which compares with nothing published: --evaluation.extractor pixels"
            ) from None
        name = self.reference or (None if dataset is not None else provenance.get("reference"))
        if name is None and dataset is None:
            raise SettingsError(
                "`evaluation` must have real images or their statistics, got neither. Try: --evaluation.reference FOLDER_OF_IMAGES, a data: "
                "block, or --evaluation.samples 0"
            )
        clip = None
        if self.clip is not None:
            clip = extractor if isinstance(extractor, Clip) else Clip(self.clip, device)
        with waiting("computing statistics of the real images"):
            if name is not None:
                reference = find_reference(name, extractor, shape)
            else:
                assert dataset is not None  # by the check above
                reference = reference_for(dataset, extractor)
        return Scorer(reference, extractor, self.samples, self.metrics, self.batch, bf16, clip=clip)
