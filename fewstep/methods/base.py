"""The interface of a distillation method, and the records it works on. Knows no optimizer, precision, device or file.

An objective implements one paper: a frozen record of hyper-parameters that computes two losses. The trainer makes the
samples x, so that one rollout can serve both updates. It passes x as a leaf, so that each term's gradient on x can be
measured.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Cond, Denoiser, feature_of, tap
from fewstep.system.tagged import Tagged

if TYPE_CHECKING:  # annotations only: importing a method must not load the teachers
    from fewstep.diffusion.generator import Generator
    from fewstep.diffusion.guidance import Rule
    from fewstep.evaluation.perceptual import Perceptual
    from fewstep.teachers.base import Teacher

__all__ = ["Batch", "Critic", "Nets", "Objective", "Pairs", "Terms"]


class Critic(nn.Module):
    """The trained critic: the fake score D_f and, for GAN methods, a discriminator head on one of its layers.

    Args:
        denoiser: D_f, trainable.
        head: maps the tapped feature to logits [B]; None for methods without a GAN.
        bottleneck: name of the layer that the head reads.
    """

    def __init__(self, denoiser: Denoiser, head: nn.Module | None = None, bottleneck: str = "") -> None:
        super().__init__()
        self.denoiser, self.head, self.bottleneck = denoiser, head, bottleneck

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Fake score's clean samples D_f(x_t, t), shape of `x_t`."""
        return self.denoiser(x_t, t, **cond)

    def denoised_and_logits(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Compute D_f(x_t, t) and the head's logits [B] (positive: looks real) in one forward."""
        with tap(self.denoiser, self.bottleneck) as features:
            denoised = self.denoiser(x_t, t, **cond)
        return denoised, self._read(features[0])

    def residual_and_logits(self, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Compute D_f's `Denoiser.residual` and the head's logits [B] on the same noised samples in one forward."""
        with tap(self.denoiser, self.bottleneck) as features:
            residual = self.denoiser.residual(x, t, eps, **cond)
        return residual, self._read(features[0])

    def logits(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Compute only the head's logits [B]: the forward ends at the bottleneck."""
        return self._read(feature_of(self.denoiser, self.bottleneck, x_t, t, **cond))

    def _read(self, feature: Tensor) -> Tensor:
        """Logits of a feature, in float32 whatever the networks' precision, as in DMD2's program."""
        assert self.head is not None, "this critic has no GAN head"
        with torch.autocast(feature.device.type, enabled=False):
            return self.head(feature.float())


@dataclass
class Nets:
    """The three networks of a distillation. D_r is frozen; only the network that is being updated is trainable.

    Attributes:
        generator: G.
        teacher: D_r, with the objective's guidance.
        learned: D_f, or None if the objective needs no critic.
        perceptual: distance for the regression on pairs, if the objective needs it.
        null: function from a condition to the empty condition, for methods that guide the fake score.
    """

    generator: Generator
    teacher: Denoiser
    learned: Critic | None
    perceptual: Perceptual | None = None
    null: Callable[[Cond], Cond] | None = None

    @property
    def critic(self) -> Critic:
        """Critic of an objective that has one."""
        assert self.learned is not None, "this objective has no critic"
        return self.learned


@dataclass
class Pairs:
    """Noise z_ref [B, ...], the teacher's samples y_ref [B, ...] from it, and their condition."""

    z: Tensor
    y: Tensor
    cond: Cond


@dataclass
class Batch:
    """One micro-batch without its samples x.

    Attributes:
        cond: the condition of the samples, each tensor [B, ...].
        step: 0-based index of the generator call that produced x; its time is `nets.generator.times[step]`.
        x_t: input of that call [B, ...], without gradient; pure noise at step 0. For losses along a trajectory, such as
            TDM's (arXiv 2503.06674) and DP-DMD's on the first step (arXiv 2602.03139).
        real: real images [B, ...] for `critic_loss`, if the method needs them.
        real_cond: their condition.
        pairs: teacher pairs, if the method needs them.
        images: number of samples that training has seen so far, for terms that begin later.
    """

    cond: Cond
    step: int = 0
    x_t: Tensor | None = None
    real: Tensor | None = None
    real_cond: Cond = field(default_factory=dict)
    pairs: Pairs | None = None
    images: int = 0


@dataclass
class Terms:
    """Terms of a loss, and numbers for the log.

    Attributes:
        losses: name -> scalar with gradient; their sum is the loss.
        stats: name -> detached scalar for the log.
        probe: times [B], noised samples and predictions, for panels and the log's numbers by noise level.
        balance: name -> (other name, ratio, most): the first term's gradient on x is scaled to `ratio` times the norm of the
            other's, by a factor of at most `most`.
        one_graph: True if the losses share a forward, whose graph is then kept until the last backward.
    """

    losses: dict[str, Tensor]
    stats: dict[str, Tensor] = field(default_factory=dict)
    probe: dict[str, Tensor] = field(default_factory=dict)
    balance: dict[str, tuple[str, float, float]] = field(default_factory=dict)
    one_graph: bool = False


class Objective(Tagged):
    """Interface of a distillation method, with the settings common to all methods."""

    tag_field: ClassVar[str] = "method"

    method: str
    critic_steps: int = Field(1, ge=1)
    """Critic updates per generator update."""
    critic_first: bool = False
    """Update the critic before the generator in each iteration."""
    share_rollout: bool = True
    """Use one set of samples for both updates of an iteration; otherwise the critic gets fresh samples."""
    guidance: float | None = Field(None, ge=0)
    """Classifier-free guidance scale of the teacher; null for none. The fake score is never guided."""
    guidance_interval: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    """Least and largest noise-to-signal ratio at which guidance acts; null: at all. Keeps variety (arXiv 2404.07724)."""
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """Share of guidance's gain in contrast that is taken back, against over-saturation (arXiv 2305.08891: 0.7)."""
    anchor: float = Field(0.0, ge=0)
    """Weight of a pull of the first step to the teacher's samples, from the noisiest level (`dp_dmd.anchor_loss`); 0: none."""
    anchor_share: float = Field(0.25, gt=0, le=1)
    """Share of the samples that are pulled."""
    anchor_steps: int = Field(8, ge=1)
    """Steps of the teacher from that noise."""

    @model_validator(mode="after")
    def _limits_guidance(self) -> Objective:
        assert self.guidance_with is None or self.guidance is not None  # building it refuses limits of no guidance
        if self.anchor and self.starts_from == "images":
            raise ValueError(f"anchor must be 0 for method `{self.method}`, which draws no samples, got {self.anchor}")
        return self

    @property
    def guidance_with(self) -> Rule | None:
        """Guidance of the teacher with its interval and rescaling; None without guidance."""
        from fewstep.diffusion.guidance import guidance_rule  # importing a method stays small

        return guidance_rule(self.guidance, self.guidance_interval, self.guidance_rescale)

    @property
    def needs_real(self) -> bool:
        """True if batches must hold real images."""
        return False

    @property
    def needs_pairs(self) -> bool:
        """True if batches must hold teacher pairs."""
        return False

    @property
    def starts_from(self) -> Literal["noise", "pairs", "images"]:
        """Origin of the samples x: a rollout from fresh noise, one step from the pairs' noise, or real images as they are."""
        return "noise"

    @property
    def needs_critic(self) -> bool:
        """True if there is a fake score to train."""
        return True

    def make_critic(self, teacher: Teacher, denoiser: Denoiser) -> Critic:
        """Make a critic around `denoiser`, the fake score, which starts with the teacher's weights."""
        return Critic(denoiser)

    def check(self, steps: int, transition: str) -> None:
        """Refuse a rollout that the method cannot train.

        Args:
            steps: calls of the generator.
            transition: see `fewstep.diffusion.generator.Transition`.

        Raises:
            ValueError: another number of steps or transition is needed.
        """

    @abstractmethod
    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        """Compute the generator's loss on samples `x` [B, ...]; the critic's weights are frozen."""

    @abstractmethod
    def critic_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        """Compute the critic's loss on detached samples `x` [B, ...]."""

    def advise(self, stats: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield this method's own warnings as (code, text with advice)."""
        return iter(())
