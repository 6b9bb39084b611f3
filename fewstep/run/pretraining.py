"""The training of a teacher as a typed record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from tyro.conf import Suppress

from fewstep.data import DataSpec, ImageDataset, Prepared
from fewstep.diffusion.augment import AUGMENT_DIM
from fewstep.diffusion.noise import LogNormalNoise, NoiseLaw
from fewstep.formats.model import DenoiserSpec
from fewstep.run.frozen import check_frozen
from fewstep.run.prepared import prepared_images
from fewstep.run.provenance import provenance_of
from fewstep.run.scoring import EvaluationSpec
from fewstep.system.console import waiting
from fewstep.system.errors import SettingsError
from fewstep.system.record import Record
from fewstep.teachers import DiffusersTeacher
from fewstep.training.optim import OptimSpec, check_offload
from fewstep.training.pretrain import Pretraining
from fewstep.training.spec import TrainSpec
from fewstep.training.trainer import Trainer

__all__ = ["PretrainRun"]


class PretrainRun(Record):
    """Train a teacher."""

    kind: Literal["pretrain"] = "pretrain"
    imports: Annotated[tuple[str, ...], Suppress] = ()  # no override: the command reads `--imports` before the run
    """Python files (relative to this one) and modules that add networks and data sets: [my_network.py]."""
    denoiser: DenoiserSpec = DenoiserSpec()
    """What to train."""
    pipeline: DiffusersTeacher | None = None
    """Train the network of a text-to-image pipeline further, instead of `denoiser`, on prepared images
    (`data: {kind: prepared}`). The run's folder then holds a whole pipeline."""
    guidance: float | None = Field(None, ge=0)
    """Guidance scale of the sampler, when scoring and drawing; null for none."""
    data: DataSpec
    """Images and labels."""
    fit_network: bool = False
    """Take size, channels and classes of the network from the data; the rest of `denoiser.net` is used as it stands."""
    noise: NoiseLaw = LogNormalNoise()
    """Noise levels of training."""
    label_dropout: float = Field(0.1, ge=0, le=1)
    """Share of images whose class is hidden, for classifier-free guidance."""
    flip: bool = False
    """Mirror half of the images left to right."""
    augment: float = Field(0.0, ge=0, le=1)
    """Probability of EDM's augmentations, for networks with augment_dim 9 (0.12 for CIFAR-10, 0.15 for FFHQ, AFHQv2)."""
    optim: OptimSpec = OptimSpec(lr=1e-3)
    """Its optimizer."""
    train: TrainSpec
    """Length, batch, seed."""
    evaluation: EvaluationSpec = EvaluationSpec()
    """Scoring during the run."""

    def trainer(self, folder: Path) -> Trainer:
        """Load and build everything for `fit()`.

        Raises:
            ValueError: a sub-class of it, with a remedy, for settings or inputs that do not fit.
        """
        if self.train.offload:
            check_offload(self.optim)
        check_frozen(self.pipeline, {}, self.train, distils=False)
        if self.pipeline is not None:
            return self._of_pipeline(folder)
        self.evaluation.drawn(None, None, self.train.torch_device())
        with waiting("loading the images"):
            dataset = self.data.load()
        denoiser = self.fitted(dataset) if self.fit_network else self.denoiser
        net = denoiser.net
        if tuple(net.sample_shape) != dataset.shape:
            raise SettingsError(
                f"`denoiser.net` must have the shape of {dataset.name}, {list(dataset.shape)}, got {list(net.sample_shape)}. "
                "Try: set denoiser.net.size and .channels"
            )
        if net.num_classes != dataset.num_classes:
            raise SettingsError(
                f"`denoiser.net.num_classes` must be that of {dataset.name}, {dataset.num_classes}, got {net.num_classes}"
            )
        if self.augment and getattr(net, "augment_dim", 0) != AUGMENT_DIM:
            raise SettingsError(
                f"`denoiser.net.augment_dim` must be {AUGMENT_DIM} for augment {self.augment}. Try: set it (EDM's networks have it), "
                "or leave augment out"
            )
        scorer = self.evaluation.scorer(dataset.shape, dataset, {}, self.train.torch_device(), self.train.bf16())
        provenance = provenance_of(self) | {"data": dataset.name}
        task = Pretraining(
            denoiser,
            dataset,
            self.optim,
            self.train,
            self.noise,
            self.label_dropout,
            scorer,
            self.evaluation.evaluations,
            provenance,
            self.augment,
            self.flip,
            guidance=self.guidance,
        )
        task.inputs = {**task.inputs, **(scorer.inputs if scorer else {})}
        return Trainer(task, self.train, folder, describe="pretrain")

    def fitted(self, dataset: ImageDataset) -> DenoiserSpec:
        """Record of the denoiser for a data set's shape and classes.

        Raises:
            SettingsError: the network cannot have that size.
        """
        channels, height, width = dataset.shape
        if height != width:
            raise SettingsError(
                f"`data` must have square images for fit_network, got {width}x{height} of {dataset.name}. Try: data.size 32"
            )
        own = {"size": height, "channels": channels, "num_classes": dataset.num_classes}
        net = self.denoiser.net
        try:
            fitting = type(net).model_validate(net.model_dump() | own)
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise SettingsError(f"`data.size` must fit the network: {said}. Try: data.size 32") from None
        return self.denoiser.model_copy(update={"net": fitting})

    def _of_pipeline(self, folder: Path) -> Trainer:
        """Build the trainer for a pipeline's network."""
        assert self.pipeline is not None
        if not isinstance(self.data, Prepared):
            raise SettingsError(
                "`data` must be prepared images for a pipeline's network. Try: `fewstep prepare PIPELINE --images FOLDER --out "
                "PREPARED`, then data: {kind: prepared, path: PREPARED} and pipeline.prompts: PREPARED"
            )
        if self.flip or self.augment or self.denoiser != DenoiserSpec():
            raise SettingsError(
                "flip, augment and denoiser must be left out for a pipeline: they are for networks trained on pixels from scratch"
            )
        if self.label_dropout and self.pipeline.negative_prompt is not None:
            raise SettingsError(
                "pipeline.negative_prompt must be left out while label_dropout trains the empty prompt, got "
                f"{self.pipeline.negative_prompt!r}. Try: label_dropout 0"
            )
        with waiting(f"loading {self.pipeline.path}"):
            teacher = self.pipeline.load()
        dataset = prepared_images(teacher, self.pipeline.prompts, self.data)
        device = self.train.torch_device()
        scorer = self.evaluation.scorer(teacher.picture_shape, None, {}, device, self.train.bf16())
        provenance = provenance_of(self) | {"data": dataset.name}
        assert teacher.student_spec is not None, "a network of diffusers"
        task = Pretraining(
            teacher.student_spec, dataset, self.optim, self.train, self.noise, self.label_dropout, scorer,
            self.evaluation.evaluations, provenance, pipeline=teacher, guidance=self.guidance,
            drawn=self.evaluation.drawn(self.pipeline, teacher, device),
        )  # fmt: skip
        task.inputs = {**task.inputs, **(scorer.inputs if scorer else {})}
        return Trainer(task, self.train, folder, describe="pretrain")
