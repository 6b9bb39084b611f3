"""The mathematics the methods share, as pure functions: no draws, no networks' weights, no settings.

Symbols: x samples, D_r the teacher's and D_f the fake score's denoised noised samples, B the batch, N = C H W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.diffusion.noise import unsqueeze_as

__all__ = [
    "discriminator_loss",
    "dm_gradient",
    "gan_generator_loss",
    "inject_gradient",
    "mean_abs",
    "sid_loss",
]


def mean_abs(x: Tensor) -> Tensor:
    """Mean absolute value of each sample: [B, ...] -> [B]."""
    return x.abs().flatten(1).mean(1)


def dm_gradient(x: Tensor, d_real: Tensor, d_fake: Tensor) -> Tensor:
    """DMD's distribution matching gradient on x, (D_f - D_r) / mean|x - D_r| per sample.

    Yin et al. 2024 (arXiv 2311.18828), eq. 7 with the weight of eq. 8: w_t alpha_t (s_fake - s_real) with
    w_t = (sigma_t² / alpha_t) C S / ‖D_r - x‖₁, in which sigma_t and alpha_t cancel. A sample whose weight 1 / mean|x - D_r| is
    not finite gets no gradient; that of a fake score that is not finite stays so, to be seen.

    Args:
        x: samples [B, ...].
        d_real: D_r of the noised samples, shape of `x`.
        d_fake: D_f of the same, shape of `x`.

    Returns:
        The gradient, shape of `x`.
    """
    distance = unsqueeze_as(mean_abs(x - d_real), x)
    # the authors' nan_to_num makes the largest float of an infinite weight: a step of any size
    return torch.where(unsqueeze_as(dm_weighted(x, d_real), x), (d_fake - d_real) / distance, 0.0)


def dm_weighted(x: Tensor, d_real: Tensor) -> Tensor:
    """Samples [B] (bool) whose weight 1 / mean|x - D_r| in `dm_gradient` is finite; the others get no gradient."""
    distance = mean_abs(x - d_real)
    return torch.isfinite(1 / distance) & torch.isfinite(distance)


def inject_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar loss whose gradient on x is `gradient` / (B N): ½ mean (x - sg(x - gradient))²."""
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def sid_loss(x: Tensor, d_real: Tensor, d_fake: Tensor, alpha: float) -> Tensor:
    """SiD's generator loss, omega (D_r - D_f)·[(D_r - x) - alpha (D_r - D_f)], per sample, summed over pixels: [B].

    Zhou et al. 2024 (arXiv 2404.04057), eq. 23, with omega = 1 / mean|x - D_r|, which carries no gradient. With a =
    D_r - x and b = D_f - x it is omega [(1 - alpha) a² + (2 alpha - 1) a·b - alpha b²]. The gradient runs into x
    directly and through x_t into both networks, so `d_real` and `d_fake` must hold their graphs. The value may be
    negative.
    """
    with torch.no_grad():
        omega = 1 / mean_abs(x - d_real).clamp(min=1e-5)
    difference = d_real - d_fake
    return omega * (difference * ((d_real - x) - alpha * difference)).flatten(1).sum(1)


def gan_generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss, mean softplus(-logit) (Goodfellow et al. 2014)."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(logit of fakes) + mean softplus(-logit of reals)."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
