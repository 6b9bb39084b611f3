"""Consistency distillation (Song et al., ICML 2023, arXiv 2303.01469): a baseline without a fake score."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.noise import ddim_step, double_device, unsqueeze_as
from fewstep.methods.base import Batch, Nets, Objective, Terms

__all__ = ["Consistency", "OnTrajectories"]


class OnTrajectories(Objective):
    """A method on the teacher's trajectories through real images, without a critic."""

    @property
    def needs_real(self) -> bool:
        return True

    @property
    def needs_critic(self) -> bool:
        return False

    @property
    def starts_from(self) -> Literal["images"]:
        return "images"

    def critic_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        raise AssertionError("consistency distillation has no critic")


class Consistency(OnTrajectories):
    """One network G for all times gives the same sample at two neighbouring points of the teacher's trajectory:

        L = mean d(G(x_t, t), sg(G(x_s, s))),  x_s = DDIM(D_r(x_t, t), x_t, t -> s)     eq. 7
        d(a, b) = √(|a - b|² + c²) - c,  c = 0.00054 √N     pseudo-Huber, Song & Dhariwal 2024 (arXiv 2310.14189), section 3.3

    t is uniform on a grid of `levels` intervals, s the next point below it; at s = 0 the target is x_s itself, which is the
    paper's boundary condition. x_t is a noised real image. Departures: the target has the trained weights, not averaged ones
    (arXiv 2310.14189, section 3.2), and the ODE step is DDIM's, not Heun's. Several times of the generator are multistep
    consistency sampling (algorithm 1).
    """

    method: Literal["consistency"] = "consistency"
    levels: int = Field(18, ge=2)
    """Intervals of the grid (the paper: 18 for CIFAR-10, 40 for ImageNet-64)."""

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        schedule, student = nets.teacher.schedule, nets.generator.denoiser
        index = torch.randint(1, self.levels + 1, (len(x),))
        t, s = ((i.double() / self.levels).to(double_device(x.device)) for i in (index, index - 1))
        x_t = schedule.perturb(x, t, torch.randn_like(x))
        with torch.no_grad():
            x_s = ddim_step(schedule, nets.teacher(x_t, t, **batch.cond), x_t, t, s)
            target = torch.where(unsqueeze_as(s > 0, x), student(x_s, s.clamp(min=1e-6), **batch.cond), x_s)
        difference = (student(x_t, t, **batch.cond) - target).flatten(1)
        c = 0.00054 * difference.shape[1] ** 0.5
        return Terms({"consistency": ((difference.square().sum(1) + c**2).sqrt() - c).mean()})
