"""Few-step generators: a denoiser called at K fixed times. Training and inference use the same rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.noise import Schedule, ddim_step, double_device

__all__ = ["Generator", "Rollout", "Transition", "calls_at"]

Transition = Literal["renoise", "ode"]
"""Transition from the sample x of one call to the input of the next: `renoise` perturbs x with fresh noise, `ode` is a
deterministic DDIM step."""


class Rollout(NamedTuple):
    """Samples, and the network call that produced them."""

    x: Tensor
    """Clean samples [B, ...]."""
    step: int
    """0-based index of that call."""
    x_t: Tensor
    """Its input [B, ...], without gradient; pure noise at step 0."""
    t: Tensor
    """Its time [B], float64."""


class Generator(nn.Module):
    """Generator of K network calls from pure noise to a sample:

        x^(1) = D(sigma_init z_1, t_1)
        x^(i+1) = D(alpha x^(i) + sigma z_(i+1), t_(i+1))    with alpha, sigma at t_(i+1); `renoise`

    One call is DMD's and SiD's generator, G(z) = D(sigma_init z, sigma_init). Several calls with fresh noise are DMD2's
    multi-step generator (Yin et al. 2024, arXiv 2405.14867, section 4.4). Several calls with DDIM steps (`ode`, `ddim_step`)
    are the generator of trajectory methods (TDM, arXiv 2503.06674; DP-DMD, arXiv 2602.03139).

    Args:
        denoiser: the network, usually a trained copy of the teacher.
        times: normalised times t_1 > ... > t_K.
        transition: step from x to the next call's input.

    Raises:
        ValueError: the times are empty, do not fall strictly, or lie outside (0, 1].
    """

    def __init__(self, denoiser: Denoiser, times: Sequence[float], transition: Transition = "renoise") -> None:
        super().__init__()
        if not times or list(times) != sorted(set(times), reverse=True) or not 0 < times[-1] <= times[0] <= 1:
            raise ValueError(
                f"generator times must fall strictly within (0, 1], got {list(times)}. Try: [1.0, 0.75, 0.5]"
            )
        self.denoiser = denoiser
        self.times = tuple(float(t) for t in times)
        self.transition = transition

    @property
    def steps(self) -> int:
        """Number of network calls K of a finished sample."""
        return len(self.times)

    def forward(self, noise: Sequence[Tensor], **cond: Tensor) -> Tensor:
        """Samples x [B, ...] of `rollout`."""
        return self.rollout(noise, **cond).x

    def rollout(self, noise: Sequence[Tensor], **cond: Tensor) -> Rollout:
        """Run the first `len(noise)` steps and return the last x0; gradients flow through the last call only.

        With K noises this is inference. With fewer it is the training sample of step s = len(noise): DMD2's backward
        simulation, in which the student sees its own intermediate samples and never noised real images.

        Args:
            noise: one unit Gaussian [B, ...] per step. The first is the input (exactly pure noise), each later one
                renoises the previous sample. An `ode` transition uses only the first.
            cond: the condition, each tensor [B, ...].

        Returns:
            Clean samples [B, ...], and the call that produced them.
        """
        assert 1 <= len(noise) <= self.steps, f"{len(noise)} noises for {self.steps} steps"
        schedule, x = self.denoiser.schedule, noise[0]
        for step, time in enumerate(self.times[: len(noise)]):
            t = torch.full((len(x),), time, dtype=torch.float64, device=double_device(x.device))
            if step == 0:
                x_t = schedule.init_scale(time) * noise[0]
            elif self.transition == "ode":
                x_t = ddim_step(schedule, x, x_t, torch.full_like(t, self.times[step - 1]), t)
            else:
                x_t = schedule.perturb(x, t, noise[step])
            last = step == len(noise) - 1
            if last and step > 0:
                # before torch 2.10 autocast caches weight casts made without gradients: the last call would get no gradient
                torch.clear_autocast_cache()
            with torch.set_grad_enabled(last and torch.is_grad_enabled()):
                x = self.denoiser(x_t, t, **cond)
        return Rollout(x, step, x_t, t)


def calls_at(schedule: Schedule, sigmas: Sequence[float], setting: str) -> tuple[float, ...]:
    """Normalised times of noise-to-signal ratios, which must lie within the schedule's grid; nothing is clamped.

    Args:
        schedule: the teacher's schedule.
        sigmas: noise-to-signal ratio of each call.
        setting: name of the user's setting, for the message.

    Raises:
        ValueError: a ratio lies outside the grid.
    """
    alpha, sigma = (end.double() for end in schedule.alpha_sigma(torch.tensor([0.0, 1.0], dtype=torch.float64)))
    low, high = (sigma / alpha).tolist()
    slack = 1e-5  # coefficients are float32; the grid's own ends must pass
    for value in sigmas:
        if not (value > 0 and low * (1 - slack) <= value <= high * (1 + slack)):
            raise ValueError(
                f"{setting} must lie between the model's sigma_min {low:.4g} and sigma_max {high:.4g}, got {value:g}. Try: a "
                "level within them"
            )
    times = schedule.time(torch.tensor(list(sigmas), dtype=torch.float64)).tolist()
    return tuple(min(time, 1.0) for time in times)  # rounding may exceed 1 at the grid's end
