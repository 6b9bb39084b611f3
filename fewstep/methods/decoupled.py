"""Decoupled DMD: matching and guidance as two terms (Liu et al. 2025, arXiv 2511.22677). From memory of the paper."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fewstep.diffusion.noise import NoiseLaw, UniformTime, double_device
from fewstep.methods.base import Batch, Nets, Terms
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.losses import distribution_matching, dm_gradient, inject_gradient

if TYPE_CHECKING:
    from fewstep.diffusion.guidance import Guided

__all__ = ["DecoupledDMD"]


class DecoupledDMD(DMD2):
    """DMD2 under guidance s, split into matching the unguided teacher and augmenting guidance, each with its own law of noise:

        g = (D_f - D_cond) / mean|x - D_cond|     at t from `noise`
          - (s - 1) (D_cond - D_null) / mean|x - D_cond|     at t from `guidance_noise`

    At equal t the two add up to DMD2's gradient but for the weight, whose D_r is guided there. `above_next` keeps guidance to
    noise above the level to which the call's sample is taken next, so that it acts on what is still to be decided (the paper's
    hybrid schedule, as we understand it). The default scale and laws are not the paper's: its values are not at hand.
    """

    method: Literal["decoupled-dmd"] = "decoupled-dmd"  # type: ignore[assignment]
    guidance: float | None = Field(4.0, ge=0)
    """Guidance scale s; above 1."""
    gan_weight: float = Field(0.0, ge=0)
    noise: NoiseLaw = UniformTime(low=0.02, high=0.98, steps=1000)
    """Noise levels of the matching term."""
    guidance_noise: NoiseLaw = UniformTime(low=0.02, high=0.98, steps=1000)
    """Noise levels of the guidance term."""
    above_next: bool = True
    """Scale the times of `guidance_noise` to the range between the generator's next time and 1."""

    @model_validator(mode="after")
    def _guided(self) -> DecoupledDMD:
        if self.guidance is None or self.guidance <= 1:
            raise ValueError(
                f"guidance must be above 1, got {self.guidance}. Try: method `dmd2`, which needs no guidance"
            )
        return self

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        guided, times = cast("Guided", nets.teacher), nets.generator.times  # by `_guided`
        terms = distribution_matching(replace(nets, teacher=guided.denoiser), x, batch, self.noise)
        t = self.guidance_noise.draw(len(x), guided.schedule).to(double_device(x.device))
        if self.above_next and batch.step + 1 < len(times):
            t = times[batch.step + 1] + (1 - times[batch.step + 1]) * t
        with torch.no_grad():
            x_t = guided.schedule.perturb(x, t, torch.randn_like(x))
            conditional, unconditional = guided.halves(x_t, t, batch.cond)
            # dm_gradient(x, D_r, D_f) = (D_f - D_r) / mean|x - D_r|: here D_r - D_f is what guidance adds to D_cond
            added = guided.combine(conditional, unconditional, t) - conditional
            gradient = dm_gradient(x, conditional, conditional - added)
        terms.losses["guidance"] = inject_gradient(x, gradient)
        return self.add_gan(terms, nets, x, batch)
