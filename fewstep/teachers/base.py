"""The interface of a teacher, and the conditioning of its samples. Knows no method and no trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Cond, Denoiser, Guided
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.formats.model import DenoiserSpec
from fewstep.networks.lora import Adapted, LoraSpec
from fewstep.system.errors import SettingsError, TeacherError
from fewstep.system.tagged import Tagged

__all__ = ["ClassLabels", "Codec", "Conditioner", "NoPrompts", "Teacher", "TeacherSpec"]


class Conditioner(ABC):
    """Indices to conditions: of classes, or of prompts whose embeddings are at hand.

    Attributes:
        num_classes: how many there are, 0 if samples are unconditional. The index `num_classes` is the empty condition,
            what guidance contrasts with and label dropout trains.
        names: of the classes, or the prompts themselves.
        sha256: of the prompts; empty for classes, whose number and meaning belong to the network.
    """

    num_classes: int
    names: Sequence[str]
    sha256: str = ""

    @abstractmethod
    def cond(self, labels: Tensor | None, count: int) -> dict[str, Tensor]:
        """The condition for `labels` [count] (None: the empty one everywhere).

        Raises:
            TeacherError: an index that does not exist.
        """

    @abstractmethod
    def null(self, cond: Cond) -> Cond:
        """The empty condition of the same batch; entries that are no condition on content, such as augmentation numbers, stay."""

    def draw(self, count: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Uniformly random conditions for `count` samples, from torch's global generator."""
        labels = torch.randint(self.num_classes, (count,)) if self.num_classes else None
        return {name: value.to(device) for name, value in self.cond(labels, count).items()}

    def check(self, labels: Tensor) -> None:
        """Raises TeacherError for an index that does not exist."""
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= self.num_classes:
            bad = int(labels.max() if int(labels.max()) > self.num_classes else labels.min())
            known = ", ".join(f"{i} {name}" for i, name in enumerate(self.names[:20])) or f"0 to {self.num_classes - 1}"
            raise TeacherError(f"class {bad} does not exist: this model knows {known}")


@dataclass(frozen=True)
class ClassLabels(Conditioner):
    """Conditions that are class indices; with no classes, the empty condition."""

    num_classes: int
    names: tuple[str, ...] = ()

    def cond(self, labels: Tensor | None, count: int) -> dict[str, Tensor]:
        if self.num_classes == 0:
            return {}
        if labels is None:
            labels = torch.full((count,), self.num_classes)
        self.check(labels)
        return {"labels": labels}

    def null(self, cond: Cond) -> Cond:
        if "labels" not in cond:
            return dict(cond)
        return {**cond, "labels": torch.full_like(cond["labels"], self.num_classes)}  # augmentation numbers stay


@dataclass(frozen=True)
class NoPrompts(Conditioner):
    """Stands for the prompts of a text-to-image model that was given none: it can be read and exported, not called."""

    path: str
    num_classes: int = 0
    names: tuple[str, ...] = ()

    def cond(self, labels: Tensor | None, count: int) -> dict[str, Tensor]:
        raise TeacherError(
            f"{self.path} must have prompts, got none. Try: teacher.prompts, a folder of `fewstep prepare`, or `fewstep "
            "sample --prompt TEXT`"
        )

    def null(self, cond: Cond) -> Cond:
        return dict(self.cond(None, 1))


@dataclass(frozen=True)
class Codec:
    """From what the networks work on, such as latents, to pictures.

    Attributes:
        decode: samples [B, ...] to pictures in [-1, 1] [B, *shape].
        encode: pictures to samples, for data.
        shape: of a picture, (C, H, W).
        sha256: of its weights and scaling, so that samples encoded with another are refused.
        decoder: sha256 of another network that decodes; empty if the codec is one network.
    """

    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int]
    sha256: str
    decoder: str = ""


@dataclass(frozen=True)
class Teacher:
    """A frozen diffusion model and all that a distillation needs to know about it.

    Attributes:
        name: for logs and cards.
        denoiser: D_r, frozen; guided if the run asks for guidance.
        shape: one sample, (C, H, W) or (D,).
        conditioner: labels or prompts -> conditions.
        start: makes a fresh trainable denoiser that starts where the teacher stands.
        bottleneck: layer of that denoiser's `net` whose output GAN heads read.
        student_spec: what that denoiser is, for the student's file; None: loading the teacher again tells.
        sha256: of the weights, for protocol ids and cards.
        images: whether samples are pictures in [-1, 1], or become such by the codec.
        codec: samples -> pictures; None if they are pictures already.
        save: writes the model as its own library does, with a denoiser's weights by name; None if it has no such form.
        guided_inside: the network is told a guidance scale and was distilled under it (FLUX.1-dev).
        sizes: the same model at each size of picture that it is trained at; empty: at its own alone.
        framed: (height and width that pictures had, and rows and columns cut off at their top and left [B, 4]) -> conditions
            that say so to the network; None: it is told nothing of that.
    """

    name: str
    denoiser: Denoiser
    shape: tuple[int, ...]
    conditioner: Conditioner
    start: Callable[[], Denoiser]
    bottleneck: str
    student_spec: DenoiserSpec | None = None
    sha256: str = ""
    images: bool = True
    provenance: dict[str, object] = field(default_factory=dict)
    codec: Codec | None = None
    save: Callable[[Path, Mapping[str, Tensor]], None] | None = None
    guided_inside: bool = False
    sizes: tuple[Teacher, ...] = ()
    framed: Callable[[Tensor], dict[str, Tensor]] | None = None

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """Shape of a decoded sample, which is looked at and scored."""
        return self.codec.shape if self.codec else self.shape

    def at(self, height: int, width: int) -> Teacher:
        """The model at one of its sizes of pictures, in pixels.

        Raises:
            TeacherError: it is none of them.
        """
        views = {(view.picture_shape[-1], view.picture_shape[-2]): view for view in (self, *self.sizes)}
        if (width, height) not in views:
            raise TeacherError(
                f"the size of a picture must be one that {self.name} was trained at, got {width}x{height}. Try: "
                f"{', '.join(f'{across}x{down}' for across, down in views)}"
            )
        return views[width, height]

    def inputs(self, owner: str) -> dict[str, str]:
        """Fingerprints of what the teacher is made from, by setting; `owner` is the name of the block of settings."""
        known = {"path": self.sha256, "prompts": self.conditioner.sha256}
        if self.codec is not None:
            known |= {"vae": self.codec.sha256, "tiny_vae": self.codec.decoder}
        return {f"{owner}.{name}": sha256 for name, sha256 in known.items() if sha256}

    def player(self, lora: LoraSpec | None = None) -> Denoiser:
        """A trainable denoiser that starts where the teacher stands: a copy, or adapters on the teacher's own network.

        Raises:
            SettingsError: the network has no layers of the names that `lora` asks for, or the teacher is no network.
        """
        if lora is None:
            return self.start()
        if not isinstance(self.denoiser, Preconditioned):
            raise SettingsError(
                f"`lora` must adapt a network, got teacher {self.name}, which is none. Try: leave it out"
            )
        return Adapted(self.denoiser, lora)

    def guided(self, scale: float | None) -> Denoiser:
        """The teacher's denoiser under classifier-free guidance (None or 1: as it is).

        Raises:
            TeacherError: guidance asked of a model without classes.
        """
        if scale is None or scale == 1:
            return self.denoiser
        if self.guided_inside:
            raise TeacherError(
                f"guidance {scale}: {self.name} is told its guidance as an input and cannot be guided from outside: leave "
                "objective.guidance out"
            )
        if self.conditioner.num_classes == 0:
            self.conditioner.cond(None, 1)  # says so if prompts are what it lacks
            raise TeacherError(
                f"guidance {scale} needs a conditional model: {self.name} has no classes; leave guidance out"
            )
        return Guided(self.denoiser, self.conditioner.null, scale)


class TeacherSpec(Tagged):
    """Interface of a family of teachers: what a run's `teacher:` holds."""

    students_stand_alone: ClassVar[bool] = False
    """Whether a student is whole in its own file: a network that `Teacher.student_spec` names, on pixels, with class labels or
    none. Otherwise the teacher is loaded to rebuild it."""

    kind: str

    @abstractmethod
    def load(self) -> Teacher:
        """Read the model.

        Raises:
            TeacherError: it is missing or damaged.
        """
