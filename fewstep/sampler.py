"""The teacher's own sampler: EDM's deterministic Heun solver of the probability-flow ODE. Knows no student.

Karras et al. 2022 (arXiv 2206.00364), algorithm 1. It works for every teacher, because any denoiser can be seen through
EDM's schedule (`View`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.denoiser import Denoiser, View
from fewstep.noise import Karras

__all__ = ["edm_view", "heun"]


def edm_view(denoiser: Denoiser) -> Denoiser:
    """The denoiser under a Karras schedule, which its own already is or else spans the same noise levels."""
    if isinstance(denoiser.schedule, Karras):
        return denoiser
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    alpha, sigma = denoiser.schedule.alpha_sigma(ends)
    low, high = (sigma / alpha).tolist()
    return View(denoiser, Karras(sigma_min=max(low, 0.002), sigma_max=min(high, 1000.0)))


def heun(denoiser: Denoiser, noise: Tensor, evaluations: int, **cond: Tensor) -> Tensor:
    """Integrate from pure noise to a sample with a given number of network evaluations.

    N steps take 2N - 1 evaluations, because the last step, to sigma = 0, has no correction. An even number leaves the
    correction out of the first step as well. Second order; all arithmetic around the network is in float64.

    Args:
        denoiser: the (possibly guided) teacher.
        noise: unit Gaussian [B, ...].
        evaluations: network calls, at least 1.
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

    def slope(x: Tensor, index: int) -> Tensor:
        denoised = view(x.float(), times[index].expand(x.shape[0]), **cond)
        return (x - denoised.double()) / sigmas[index]

    x = noise.double() * sigmas[0]
    for i in range(steps):
        step = sigmas[i + 1] - sigmas[i]
        here = slope(x, i)
        ahead = x + step * here
        corrected = i < steps - 1 and (i > 0 or evaluations % 2 == 1)
        x = x + step * (here + slope(ahead, i + 1)) / 2 if corrected else ahead
    return x.float()
