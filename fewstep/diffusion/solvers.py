"""The teacher's own sampler: EDM's Heun solver of the probability-flow ODE, deterministic or stochastic. Knows no student.

Karras et al. 2022 (arXiv 2206.00364), algorithms 1 and 2. It works for every teacher, because any denoiser can be seen
through EDM's schedule (`View`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.noise import Karras, Schedule, unsqueeze_as

__all__ = ["Churn", "View", "edm_view", "heun"]


class View(Denoiser):
    """A denoiser seen through another schedule: the same network, asked at the time of equal noise-to-signal ratio.

    x_t under `schedule` and x_t' under the denoiser's own differ by a scale once sigma/alpha agree (Karras et al. 2022,
    section 2), so that VP and VE parametrisations of one model are one model.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, schedule

    def _translate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_t, sigma_t = self.schedule.alpha_sigma(t)
        own_t = self.denoiser.schedule.time(sigma_t.double() / alpha_t.double())
        own_alpha, own_sigma = self.denoiser.schedule.alpha_sigma(own_t)
        # equal ratios: the length of (alpha, sigma) gives the scale without dividing by an alpha that may be zero
        return own_t, (own_alpha**2 + own_sigma**2).sqrt() / (alpha_t**2 + sigma_t**2).sqrt()

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        own_t, scale = self._translate(t)
        return self.denoiser(unsqueeze_as(scale, x_t) * x_t, own_t, **cond)

    def residual(self, x: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        return self.denoiser.residual(x, self._translate(t)[0], eps, **cond)


class Churn(NamedTuple):
    """Noise that the stochastic sampler adds before each step (algorithm 2), there called S_churn, S_tmin, ...

    EDM's for ImageNet-64 with 511 evaluations (table 5): Churn(40, 0.05, 50, 1.003).
    """

    amount: float
    """Noise to add over the whole way: sigma grows by the factor 1 + amount / steps, at most √2, before a step."""
    low: float = 0.0
    """Steps that begin below this sigma add none."""
    high: float = math.inf
    """Steps that begin above this sigma add none."""
    inflate: float = 1.0
    """Factor on the added noise, slightly above 1 against lost detail."""


def edm_view(denoiser: Denoiser) -> Denoiser:
    """The denoiser under a Karras schedule, which its own already is or else spans the same noise levels."""
    if isinstance(denoiser.schedule, Karras):
        return denoiser
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    alpha, sigma = denoiser.schedule.alpha_sigma(ends)
    low, high = (sigma / alpha).tolist()
    return View(denoiser, Karras(sigma_min=max(low, 0.002), sigma_max=min(high, 1000.0)))


def heun(
    denoiser: Denoiser,
    noise: Tensor,
    evaluations: int,
    churn: Churn | None = None,
    fresh: Callable[[int], Tensor] = lambda step: torch.empty(0),
    **cond: Tensor,
) -> Tensor:
    """Integrate from pure noise to a sample with a given number of network evaluations.

    N steps take 2N - 1 evaluations, because the last step, to sigma = 0, has no correction. An even number leaves the
    correction out of the first step as well. Second order; all arithmetic around the network is in float64.

    Args:
        denoiser: the (possibly guided) teacher.
        noise: unit Gaussian [B, ...].
        evaluations: network calls, at least 1.
        churn: None: the deterministic solver.
        fresh: step -> unit Gaussian [B, ...], asked for steps 0, 1, ... that add noise.
        cond: the condition, each tensor [B, ...].

    Returns:
        Samples [B, ...], float32.

    Raises:
        ValueError: if `evaluations` is below 1.
    """
    if evaluations < 1:
        raise ValueError(f"{evaluations} network evaluations make no image: use 1 or more, 35 for EDM's 18 steps")
    view = edm_view(denoiser)
    schedule = view.schedule
    steps = evaluations // 2 + 1
    times = schedule.times(steps).to(noise.device)
    sigmas = torch.cat(
        [schedule.alpha_sigma(times)[1].double(), torch.zeros(1, dtype=torch.float64, device=noise.device)]
    )

    def slope(x: Tensor, time: Tensor, sigma: Tensor) -> Tensor:
        denoised = view(x.float(), time.expand(x.shape[0]), **cond)
        return (x - denoised.double()) / sigma

    x = noise.double() * sigmas[0]
    for i in range(steps):
        time, sigma = times[i], sigmas[i]
        if churn is not None and churn.amount > 0 and churn.low <= sigma <= churn.high:
            sigma = sigma * (1 + min(churn.amount / steps, math.sqrt(2) - 1))
            time = schedule.time(sigma)
            added = (sigma**2 - sigmas[i] ** 2).sqrt()
            x = x + churn.inflate * added * fresh(i).to(x)
        step = sigmas[i + 1] - sigma
        here = slope(x, time, sigma)
        ahead = x + step * here
        corrected = i < steps - 1 and (i > 0 or evaluations % 2 == 1)
        x = x + step * (here + slope(ahead, times[i + 1], sigmas[i + 1])) / 2 if corrected else ahead
    return x.float()
