"""DP-DMD: a first step regressed on the teacher keeps variety (arXiv 2602.03139). From memory of the paper."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.noise import ddim_step, double_device
from fewstep.methods.base import Batch, Nets, Terms
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.losses import distribution_matching

__all__ = ["DPDMD", "anchor_loss"]


def anchor_loss(nets: Nets, x: Tensor, batch: Batch, share: float, steps: int) -> Tensor:
    """Mean squared distance of the first step's samples `x` [B, ...] to the teacher's trajectory from the same noise:

        mean (DDIM(x, x_T, t_1 -> s) - ODE_teacher(x_T, t_1 -> s))²

    over a `share` of the samples, with `steps` of DDIM; s is the next time of deterministic steps, else 0. In one step it is
    DMD's regression (arXiv 2311.18828, eq. 9) by squares, on pairs made on the way.
    """
    count = math.ceil(share * len(x))
    assert batch.x_t is not None and batch.step == 0
    x, x_t, cond = x[:count], batch.x_t[:count], {name: value[:count] for name, value in batch.cond.items()}
    schedule, (first, *later) = nets.teacher.schedule, nets.generator.times
    last = later[0] if later and nets.generator.transition == "ode" else 0.0
    grid = torch.linspace(first, last, steps + 1, dtype=torch.float64, device=double_device(x.device))
    times, target = [t.expand(count) for t in grid], x_t
    with torch.no_grad():
        for t, to in pairwise(times):
            target = ddim_step(schedule, nets.teacher(target, t, **cond), target, t, to)
    return (ddim_step(schedule, x, x_t, times[0], times[-1]) - target).square().mean()


class DPDMD(DMD2):
    """The first of several deterministic steps ends where the teacher's ODE does; later steps match distributions as in DMD2:

        step 1:   first_weight mean (DDIM(x, x_T, t_1 -> t_2) - ODE_teacher(x_T, t_1 -> t_2))²
        later:    DMD2's loss

    Matching alone seeks modes, and the first step decides on the composition. The teacher's trajectory is `teacher_steps` steps
    of DDIM. The number of steps and the weight are not the paper's: its values are not at hand.
    """

    method: Literal["dp-dmd"] = "dp-dmd"  # type: ignore[assignment]
    gan_weight: float = Field(0.0, ge=0)
    teacher_steps: int = Field(8, ge=1)
    """Steps of the teacher between the first two times of the generator."""
    first_weight: float = Field(1.0, gt=0)
    """Weight of the regression of the first step."""

    def check(self, steps: int, transition: str) -> None:
        if steps < 2 or transition != "ode":
            raise ValueError(
                f"method `dp-dmd` must have two steps or more and generator.transition `ode`, got {steps} and `{transition}`. Try: "
                "generator {sigmas: [80, 5], transition: ode}"
            )

    def generator_loss(self, nets: Nets, x: Tensor, batch: Batch) -> Terms:
        if batch.step > 0:
            return self.add_gan(distribution_matching(nets, x, batch, self.noise), nets, x, batch)
        return Terms({"first": self.first_weight * anchor_loss(nets, x, batch, 1.0, self.teacher_steps)})
