"""DMD: One-step Diffusion with Distribution Matching Distillation (Yin et al., CVPR 2024, arXiv 2311.18828)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.denoiser import denoising_loss
from fewstep.diffusion.noise import LogNormalNoise, NoiseLaw, UniformTime, double_device
from fewstep.methods.base import Batch, Nets, Objective, Terms
from fewstep.methods.losses import distribution_matching

__all__ = ["DMD"]


class DMD(Objective):
    """Distribution matching plus LPIPS regression on teacher pairs. One step.

        L_G = ½ mean (x - sg(x - g))² + lambda_reg E[LPIPS(G(z_ref), y_ref)]      eq. 7 to 9
        L_f = mean residual(D_f, sg(x))²                                          eq. 6

    with g of `dm_gradient` (eq. 7 and 8). Defaults are the paper's; the fake score's noise law and weight are those of the
    teacher's training.
    """

    method: Literal["dmd"] = "dmd"
    noise: NoiseLaw = UniformTime(low=0.02, high=0.98, steps=1000)
    """Noise levels at which the two scores are compared (section 4.2: 2 to 98 % of T)."""
    critic_noise: NoiseLaw = LogNormalNoise()
    """Noise levels at which the fake score is trained: those of the teacher's training."""
    regression_weight: float = Field(0.25, ge=0)
    """Weight of the perceptual regression on pairs (lambda_reg); 0 trains without pairs."""

    @property
    def needs_pairs(self) -> bool:
        return self.regression_weight > 0

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        terms = distribution_matching(nets, x, batch, self.noise)
        if self.regression_weight > 0:
            assert batch.pairs is not None and nets.perceptual is not None
            y = nets.generator([batch.pairs.z], **batch.pairs.cond)
            distance = nets.perceptual(y, batch.pairs.y).mean()
            terms.losses["regression"] = self.regression_weight * distance
            terms.stats["regression_distance"] = distance.detach()
        return terms

    def critic_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        t = self.critic_noise.draw(len(x), nets.teacher.schedule).to(double_device(x.device))
        return Terms({"denoising": denoising_loss(nets.critic.denoiser, x, t, torch.randn_like(x), batch.cond)})
