"""DMD: One-step Diffusion with Distribution Matching Distillation (Yin et al., CVPR 2024, arXiv 2311.18828)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.denoiser import denoising_loss
from fewstep.diffusion.noise import LogNormalNoise, NoiseLaw, UniformTime
from fewstep.methods.base import Batch, Nets, Objective, Terms
from fewstep.methods.losses import dm_gradient, dm_weighted, inject_gradient

__all__ = ["DMD", "distribution_matching"]


def distribution_matching(nets: Nets, x: Tensor, batch: Batch, law: NoiseLaw) -> Terms:
    """The distribution matching term of DMD and DMD2 (arXiv 2311.18828, eq. 7): no gradient through either network."""
    t = law.draw(len(x), nets.teacher.schedule).to(x.device)
    with torch.no_grad():
        x_t = nets.teacher.schedule.perturb(x, t, torch.randn_like(x))
        d_real = nets.teacher(x_t, t, **batch.cond)
        d_fake = nets.critic(x_t, t, batch.cond)
        gradient = dm_gradient(x, d_real, d_fake)
        unweighted = 1 - dm_weighted(x, d_real).float().mean()  # equal scores are no fault: a run begins with them
    return Terms(
        {"dm": inject_gradient(x, gradient)},
        stats={"dm_unweighted": unweighted},
        probe={"t": t, "x": x, "x_t": x_t, "d_real": d_real, "d_fake": d_fake},
    )


class DMD(Objective):
    """Distribution matching plus LPIPS regression on teacher pairs. One step.

    Defaults are the paper's; the fake score's noise follows the teacher's training.
    """

    method: Literal["dmd"] = "dmd"
    noise: NoiseLaw = UniformTime(low=0.02, high=0.98, steps=1000)
    """Noise levels at which the two scores are compared (section 4.2: 2 to 98 % of T)."""
    critic_noise: NoiseLaw = LogNormalNoise()
    """Noise levels the fake score is trained at: the teacher's own."""
    regression_weight: float = Field(0.25, ge=0)
    """Weight of the perceptual regression on pairs (lambda_reg); 0 leaves the pairs out."""

    @property
    def needs_pairs(self) -> bool:
        return self.regression_weight > 0

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        terms = distribution_matching(nets, x, batch, self.noise)
        if self.regression_weight > 0:
            assert batch.pairs is not None and nets.perceptual is not None
            y = nets.generator.rollout([batch.pairs.z], **batch.pairs.cond)
            distance = nets.perceptual(y, batch.pairs.y).mean()
            terms.losses["regression"] = self.regression_weight * distance
            terms.stats["regression_distance"] = distance.detach()
        return terms

    def critic_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        t = self.critic_noise.draw(len(x), nets.teacher.schedule).to(x.device)
        return Terms({"denoising": denoising_loss(nets.critic.denoiser, x, t, torch.randn_like(x), batch.cond)})

    def generator_cost(self) -> dict[str, float]:
        return {"scores": 1.0 + self.teacher_cost} | ({"regression": 3.0} if self.needs_pairs else {})

    def critic_cost(self) -> dict[str, float]:
        return {"fake score": 3.0}
