"""The interface of a teacher, and the conditioning of its samples. Knows no method and no trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Cond, Denoiser
from fewstep.diffusion.guidance import Guided, Rule, as_rule
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.formats.model import DenoiserSpec
from fewstep.networks.lora import Adapted, LoraSpec
from fewstep.system.errors import SettingsError, TeacherError
from fewstep.system.tagged import Tagged

__all__ = ["ClassLabels", "Codec", "Conditioner", "NoPrompts", "Teacher", "TeacherSpec"]


class Conditioner(ABC):
    """Map from indices to conditions: classes, or prompts with stored embeddings.

    Attributes:
        num_classes: number of classes or prompts, 0 if samples are unconditional. The index `num_classes` is the empty
            condition, used by guidance and label dropout.
        names: names of the classes, or the prompts.
        sha256: hash of the prompts; empty for classes, which belong to the network.
    """

    num_classes: int
    names: Sequence[str]
    sha256: str = ""

    @abstractmethod
    def cond(self, labels: Tensor | None, count: int) -> dict[str, Tensor]:
        """Make the condition for `labels` [count] (None: the empty condition everywhere).

        Raises:
            TeacherError: an invalid index.
        """

    @abstractmethod
    def null(self, cond: Cond) -> Cond:
        """Empty condition of the same batch; entries that do not describe content, such as augmentations, are kept."""

    def draw(self, count: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Draw uniformly random conditions for `count` samples, from torch's global generator."""
        labels = torch.randint(self.num_classes, (count,)) if self.num_classes else None
        return {name: value.to(device) for name, value in self.cond(labels, count).items()}

    def check(self, labels: Tensor) -> None:
        """Raise TeacherError for an invalid index."""
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= self.num_classes:
            bad = int(labels.max() if int(labels.max()) > self.num_classes else labels.min())
            known = ", ".join(f"{i} {name}" for i, name in enumerate(self.names[:20])) or f"0 to {self.num_classes - 1}"
            raise TeacherError(f"`classes` must be of {known}, got {bad}")


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
    """Placeholder for a text-to-image model without prompts: it can be loaded and exported, but not called."""

    path: str
    num_classes: int = 0
    names: tuple[str, ...] = ()
    constants: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    def with_constants(self, constants: dict[str, Tensor]) -> NoPrompts:
        """Copy it with the constant conditions of prompts to come."""
        return replace(self, constants=constants)

    def cond(self, labels: Tensor | None, count: int) -> dict[str, Tensor]:
        raise TeacherError(
            f"{self.path} must have prompts, got none. Try: teacher.prompts, a folder of `fewstep prepare`, or `fewstep "
            "sample --prompt TEXT`"
        )

    def null(self, cond: Cond) -> Cond:
        return dict(self.cond(None, 1))


@dataclass(frozen=True)
class Codec:
    """Map between the networks' samples, such as latents, and pictures.

    Attributes:
        decode: samples [B, ...] -> pictures [B, *shape] in [-1, 1].
        encode: pictures -> samples, for data.
        shape: shape of a picture, (C, H, W).
        sha256: hash of its weights and scaling, to refuse samples of another codec.
        decoder: sha256 of a separate decoder network; empty if the codec is one network.
    """

    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int]
    sha256: str
    decoder: str = ""


@dataclass(frozen=True)
class Teacher:
    """A frozen diffusion model with everything that a distillation needs.

    Attributes:
        name: name in logs and model cards.
        denoiser: D_r, frozen.
        shape: shape of one sample, (C, H, W) or (D,).
        conditioner: labels or prompts -> conditions.
        start: makes a new trainable denoiser with the teacher's weights.
        bottleneck: layer of that denoiser's `net` whose output GAN heads read.
        student_spec: record of that denoiser, for the student's file; None: the student's reader loads the teacher.
        sha256: hash of the weights, for protocol ids and model cards.
        images: whether samples are pictures in [-1, 1], directly or after the codec.
        codec: samples -> pictures; None if samples are pictures.
        save: writes the model in its own library's format, with a denoiser's weights by name; None if it has no such format.
        guided_inside: the network takes a guidance scale as an input and was distilled under it (FLUX.1-dev, FLUX.2-dev).
        sizes: the same model at each size of picture that it is trained at; empty: at its own alone.
        framed: (height and width that pictures had, and rows and columns cut off at their top and left [B, 4]) -> conditions
            for the network; None: the network has no such conditions.
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
        """Shape of a decoded sample."""
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
        """Fingerprints of the teacher's inputs, by setting; `owner` is the name of the settings block."""
        known = {"path": self.sha256, "prompts": self.conditioner.sha256}
        if self.codec is not None:
            known |= {"vae": self.codec.sha256, "tiny_vae": self.codec.decoder}
        return {f"{owner}.{name}": sha256 for name, sha256 in known.items() if sha256}

    def player(self, lora: LoraSpec | None = None) -> Denoiser:
        """Make a trainable denoiser with the teacher's weights: a copy, or adapters on the teacher's own network.

        Raises:
            SettingsError: the network has no layers with the names in `lora`, or the teacher is not a network.
        """
        if lora is None:
            return self.start()
        if not isinstance(self.denoiser, Preconditioned):
            raise SettingsError(f"`lora` must be left out for teacher {self.name}, which is not a network")
        return Adapted(self.denoiser, lora)

    def guided(self, guidance: Rule | float | None) -> Denoiser:
        """Teacher's denoiser with classifier-free guidance: a rule, or a scale (None or 1: without).

        Raises:
            TeacherError: guidance for a model without classes or prompts.
        """
        if (rule := as_rule(guidance)) is None:
            return self.denoiser
        if self.guided_inside:
            raise TeacherError(
                f"`objective.guidance` must be left out for {self.name}, which takes its guidance as an input, got {rule}"
            )
        if self.conditioner.num_classes == 0:
            self.conditioner.cond(None, 1)  # names the problem if it lacks prompts
            raise TeacherError(f"`guidance` must be left out for {self.name}, which has no classes, got {rule}")
        return Guided(self.denoiser, self.conditioner.null, rule)


class TeacherSpec(Tagged):
    """Interface of a teacher family: the record of a run's `teacher:`."""

    students_stand_alone: ClassVar[bool] = False
    """True if a student's file is complete: its network is `Teacher.student_spec`, on pixels, with class labels or none.
    Otherwise the teacher is loaded to rebuild the student."""

    kind: str

    @abstractmethod
    def load(self) -> Teacher:
        """Read the model.

        Raises:
            TeacherError: it is missing or damaged.
        """
