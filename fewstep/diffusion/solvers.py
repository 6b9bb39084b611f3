"""The teacher's sampler: EDM's Heun solver of the probability-flow ODE, deterministic or stochastic. Knows no student.

Karras et al. 2022 (arXiv 2206.00364), algorithms 1 and 2. It works for every teacher, because `View` gives any denoiser
EDM's schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.noise import Karras, Schedule, double_device, unsqueeze_as

__all__ = ["Churn", "View", "edm_view", "heun"]


class View(Denoiser):
    """A denoiser under another schedule: the same network, called at the time of equal noise-to-signal ratio.

        D_view(x_t, t) = D(c x_t, t')    with sigma_t' / alpha_t' = sigma_t / alpha_t,   c = alpha_t' / alpha_t

    At equal ratios x_t and x_t' differ only by the scale c (Karras et al. 2022, section 2), so VP and VE parametrisations
    are the same model.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, schedule

    def _translate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_t, sigma_t = self.schedule.alpha_sigma(t)
        own_t = self.denoiser.schedule.time(sigma_t.double() / alpha_t.double())
        own_alpha, own_sigma = self.denoiser.schedule.alpha_sigma(own_t)
        # at equal ratios the norms of (alpha, sigma) give the scale without a division by alpha, which may be zero
        return own_t, (own_alpha**2 + own_sigma**2).sqrt() / (alpha_t**2 + sigma_t**2).sqrt()

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        own_t, scale = self._translate(t)
        return self.denoiser(unsqueeze_as(scale, x_t) * x_t, own_t, **cond)

    def residual(self, x: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        return self.denoiser.residual(x, self._translate(t)[0], eps, **cond)


class Churn(NamedTuple):
    """Noise that the stochastic sampler adds before each step (algorithm 2: S_churn, S_tmin, S_tmax, S_noise).

    EDM's values for ImageNet-64 with 511 evaluations (table 5): Churn(40, 0.05, 50, 1.003).
    """

    amount: float
    """S_churn: before a step, sigma grows by the factor 1 + amount / steps, at most √2."""
    low: float = 0.0
    """S_tmin: steps that start below this sigma add no noise."""
    high: float = math.inf
    """S_tmax: steps that start above this sigma add no noise."""
    inflate: float = 1.0
    """S_noise: factor on the added noise, slightly above 1 against lost detail."""


def edm_view(denoiser: Denoiser) -> Denoiser:
    """Denoiser under a Karras schedule: its own, or a view with the same range of noise levels."""
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

    d_i = (x_i - D(x_i, sigma_i)) / sigma_i                                                  eq. 1, 3
        x_(i+1) = x_i + (sigma_(i+1) - sigma_i) (d_i + d'_(i+1)) / 2                             algorithm 1

    where d' is the slope at the Euler step x_i + (sigma_(i+1) - sigma_i) d_i. N steps take 2N - 1 evaluations, because the
    last step, to sigma = 0, has no correction. With an even number of evaluations the first step has none either. The method
    is of second order. All arithmetic outside the network is in float64.

    Args:
        denoiser: the (possibly guided) teacher.
        noise: unit Gaussian [B, ...].
        evaluations: network calls, at least 1.
        churn: settings of the stochastic solver; None for the deterministic one.
        fresh: step -> unit Gaussian [B, ...], called for each step that adds noise.
        cond: the condition, each tensor [B, ...].

    Returns:
        Samples [B, ...], float32.

    Raises:
        ValueError: `evaluations` is below 1.
    """
    if evaluations < 1:
        raise ValueError(f"`evaluations` must be at least 1, got {evaluations}. Try: 35, for EDM's 18 steps")
    view = edm_view(denoiser)
    schedule = view.schedule
    steps = evaluations // 2 + 1
    device = double_device(noise.device)
    times = schedule.times(steps).to(device)
    sigmas = torch.cat([schedule.alpha_sigma(times)[1].double(), torch.zeros(1, dtype=torch.float64, device=device)])

    def slope(x: Tensor, time: Tensor, sigma: Tensor) -> Tensor:
        denoised = view(x.float().to(noise.device), time.expand(x.shape[0]), **cond)
        return (x - denoised.to(device).double()) / sigma

    x = noise.to(device).double() * sigmas[0]
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
    return x.float().to(noise.device)
