"""Settings of the evaluation during a run, and the scorer that they build."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, StringConstraints

from fewstep.data import ImageDataset
from fewstep.evaluation.features import Clip, ExtractorName, extractor_for
from fewstep.evaluation.metrics import Metric
from fewstep.evaluation.reference import find_reference, reference_for
from fewstep.evaluation.scorer import Scorer
from fewstep.system.console import waiting
from fewstep.system.errors import EvaluationError, SettingsError
from fewstep.system.record import Record
from fewstep.teachers import DiffusersTeacher, Teacher, TeacherSpec
from fewstep.teachers.prompts import Prompts
from fewstep.training.panels import COLUMNS

__all__ = ["EvaluationSpec"]

Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2_000)]


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
    prompts: tuple[Prompt, ...] = Field((), max_length=COLUMNS)
    """Up to ten prompts that the pictures of a text-to-image run show; they are encoded once, as the run starts. Default: the
    first ten prompts that the run trains with."""

    def drawn(self, spec: TeacherSpec | None, teacher: Teacher | None, device: torch.device) -> Prompts | None:
        """Encode `prompts`; those that were prepared are looked up.

        Args:
            spec: settings of the teacher.
            teacher: the teacher, loaded.
            device: device of the text encoders.

        Returns:
            The prompts; None if none are asked for.

        Raises:
            SettingsError: the teacher takes no prompts.
            TeacherError: the text encoders are needed and missing.
        """
        if not self.prompts:
            return None
        known = teacher.conditioner if teacher is not None else None
        if not isinstance(spec, DiffusersTeacher) or not isinstance(known, Prompts):
            raise SettingsError(
                f"`evaluation.prompts` must be left out unless the teacher takes prompts, got {self.prompts[0]!r}. Try: leave it out"
            )
        places = {name: index for index, name in reversed(list(enumerate(known.names)))}
        if all(prompt in places for prompt in self.prompts):
            rows = [places[prompt] for prompt in self.prompts]
            return Prompts(
                self.prompts, lambda index: known.row(rows[index]), known.empty, known.constants, known.negative
            )
        with waiting("encoding the prompts to draw"):
            return spec.encode(self.prompts, spec.encoder(device)).with_constants(known.constants)

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
