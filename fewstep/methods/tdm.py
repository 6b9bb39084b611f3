"""TDM: Trajectory Distribution Matching (Luo et al. 2025, arXiv 2503.06674). Data-free, K steps. From memory of the paper."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.noise import ddim_step, double_device, unsqueeze_as
from fewstep.methods.base import Batch, Nets, Objective, Terms
from fewstep.methods.losses import dm_gradient, inject_gradient

__all__ = ["TDM"]


class Noised(NamedTuple):
    """A point of the student's trajectory, noised further: x_u = a x_s + b eps, with the times u and the noise eps."""

    x_u: Tensor
    u: Tensor
    b: Tensor
    eps: Tensor


class TDM(Objective):
    """Match the student's trajectory with the teacher's, interval by interval. With x_s the point at which step k arrives:

        x_s = DDIM(x, x_t, t_k -> t_k+1),  u ~ U(t_k+1, t_k),  x_u = a x_s + b eps,  a = alpha_u / alpha_s,  b² = sigma_u² - a² sigma_s²
        L_G = ½ mean (x - sg(x - g))²     with g = (D_f - D_r)(x_u) / mean|x - D_r|
        L_f = mean (eps - b (x_u - alpha_u D_f(x_u)) / sigma_u²)²     score matching: s_f = -E[eps | x_u] / b

    The last step arrives at the sample itself (alpha 1, sigma 0), so that one step is DMD's matching with u over all times. The
    intervals do not overlap, so one fake score serves them all. Uniform u and the weights are ours: the paper's are not at hand.
    """

    method: Literal["tdm"] = "tdm"
    critic_steps: int = Field(2, ge=1)

    def check(self, steps: int, transition: str) -> None:
        if steps > 1 and transition != "ode":
            raise ValueError(
                f"generator.transition must be `ode` for method `tdm`, got `{transition}`. Try: transition: ode"
            )

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        with torch.no_grad():
            at = self._noised(nets, x, batch)
            d_real, d_fake = nets.teacher(at.x_u, at.u, **batch.cond), nets.critic(at.x_u, at.u, batch.cond)
            gradient = dm_gradient(x, d_real, d_fake)
        probe = {"t": at.u, "x": x, "x_t": at.x_u, "d_real": d_real, "d_fake": d_fake}
        return Terms({"tdm": inject_gradient(x, gradient)}, probe=probe)

    def critic_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        at = self._noised(nets, x, batch)
        alpha, sigma = (unsqueeze_as(c, x) for c in nets.teacher.schedule.alpha_sigma(at.u))
        predicted = unsqueeze_as(at.b, x) * (at.x_u - alpha * nets.critic(at.x_u, at.u, batch.cond)) / sigma**2
        return Terms({"denoising": (at.eps - predicted).square().mean()})

    @staticmethod
    def _noised(nets: Nets, x: Tensor, batch: Batch) -> Noised:
        assert batch.x_t is not None
        schedule, times = nets.teacher.schedule, [*nets.generator.times, 0.0]
        t, s = (
            torch.full((len(x),), time, dtype=torch.float64, device=double_device(x.device))
            for time in times[batch.step :][:2]
        )
        u = s + (t - s) * torch.rand(len(x), dtype=torch.float64).clamp(min=1e-3).to(double_device(x.device))
        alpha_u, sigma_u = schedule.alpha_sigma(u)
        if batch.step + 1 == len(nets.generator.times):
            x_s, a, b = x, alpha_u, sigma_u
        else:
            alpha_s, sigma_s = schedule.alpha_sigma(s)
            x_s, a = ddim_step(schedule, x, batch.x_t, t, s), alpha_u / alpha_s
            b = (sigma_u**2 - (a * sigma_s) ** 2).clamp(min=1e-12).sqrt()
        eps = torch.randn_like(x)
        return Noised(unsqueeze_as(a, x) * x_s + unsqueeze_as(b, x) * eps, u, b, eps)
