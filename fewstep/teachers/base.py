"""What a teacher is, and how its samples are conditioned. Knows no method and no trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.denoiser import Cond, Denoiser, Guided, Preconditioned
from fewstep.model import DenoiserSpec

__all__ = ["ClassLabels", "Teacher", "TeacherError"]


class TeacherError(ValueError):
    """A teacher cannot be had, or does not fit what it is asked for."""


@dataclass(frozen=True)
class ClassLabels:
    """Conditions that are class indices; with no classes, the empty condition.

    The index `num_classes` stands for "no class": what guidance contrasts with and label dropout trains.
    """

    num_classes: int
    names: tuple[str, ...] = ()

    def cond(self, labels: Tensor | None, count: int) -> dict[str, Tensor]:
        """The condition for `labels` [count] (None: the empty class everywhere).

        Raises:
            TeacherError: a class that does not exist.
        """
        if self.num_classes == 0:
            return {}
        if labels is None:
            labels = torch.full((count,), self.num_classes)
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= self.num_classes:
            bad = int(labels.max() if int(labels.max()) > self.num_classes else labels.min())
            known = ", ".join(f"{i} {name}" for i, name in enumerate(self.names)) or f"0 to {self.num_classes - 1}"
            raise TeacherError(f"class {bad} does not exist: this model knows {known}")
        return {"labels": labels}

    def draw(self, count: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Uniformly random conditions for `count` samples, from torch's global generator."""
        if self.num_classes == 0:
            return {}
        return {"labels": torch.randint(self.num_classes, (count,)).to(device)}

    def null(self, cond: Cond) -> Cond:
        """The empty condition of the same batch."""
        return {name: torch.full_like(value, self.num_classes) for name, value in cond.items()}


@dataclass(frozen=True)
class Teacher:
    """A frozen diffusion model and all that a distillation needs to know about it.

    Attributes:
        name: for logs and cards.
        denoiser: D_r, frozen; guided if the run asks for guidance.
        shape: one sample, (C, H, W) or (D,).
        conditioner: labels -> conditions.
        student_spec: the network that student and fake score are.
        start: makes a fresh trainable denoiser that starts where the teacher stands.
        bottleneck: layer of that denoiser's `net` whose output GAN heads read.
        sha256: of the weights, for protocol ids and cards.
        images: whether samples are pictures in [-1, 1].
    """

    name: str
    denoiser: Denoiser
    shape: tuple[int, ...]
    conditioner: ClassLabels
    student_spec: DenoiserSpec
    start: Callable[[], Preconditioned]
    bottleneck: str
    sha256: str = ""
    images: bool = True
    card: dict[str, object] = field(default_factory=dict)

    def guided(self, scale: float | None) -> Denoiser:
        """The teacher's denoiser under classifier-free guidance (None or 1: as it is).

        Raises:
            TeacherError: guidance asked of a model without classes.
        """
        if scale is None or scale == 1:
            return self.denoiser
        if self.conditioner.num_classes == 0:
            raise TeacherError(
                f"guidance {scale} needs a conditional model: {self.name} has no classes; leave guidance out"
            )
        return Guided(self.denoiser, self.conditioner.null, scale)
