"""Losses shared by the methods: functions of samples and predictions, without settings.

Symbols: x samples, x_t = alpha_t x + sigma_t eps noised samples, D_r(x_t) the teacher's and D_f(x_t) the fake score's expected
clean sample, s = (alpha_t D(x_t) - x_t) / sigma_t² their scores, sg stop-gradient, B the batch, N = C H W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.diffusion.denoiser import Cond
from fewstep.diffusion.noise import NoiseLaw, double_device, unsqueeze_as
from fewstep.methods.base import Batch, Nets, Terms

__all__ = [
    "augmented",
    "distribution_matching",
    "dm_gradient",
    "dm_weighted",
    "inject_gradient",
    "mean_abs",
    "sid_loss",
    "sid_weight",
]


def mean_abs(x: Tensor) -> Tensor:
    """Mean absolute value of each sample: [B, ...] -> [B]."""
    return x.abs().flatten(1).mean(1)


def augmented(x: Tensor, cond: Cond, probability: float) -> tuple[Tensor, Cond]:
    """Apply EDM's augmentations to images and add their numbers to the condition; at probability 0 return both as they are."""
    if not probability:
        return x, cond
    from fewstep.diffusion.augment import augment  # few runs need it

    x, numbers = augment(x, probability)
    return x, {**cond, "augment": numbers}


def distribution_matching(nets: Nets, x: Tensor, batch: Batch, law: NoiseLaw) -> Terms:
    """Distribution matching term of DMD and DMD2, whose gradient lowers KL(p_fake || p_real) of the noised marginals.

        grad KL = E[w_t alpha_t (s_fake(x_t) - s_real(x_t)) dx/dtheta]     arXiv 2311.18828, eq. 7; arXiv 2405.14867, eq. 2

    No gradient flows through either network. `dm_gradient` computes it with the weight w_t of eq. 8.

    Args:
        nets: the networks.
        x: samples [B, ...].
        batch: their condition.
        law: noise levels at which the scores are compared.

    Returns:
        The loss "dm", the stat "dm_unweighted" (share of samples without a gradient), and the probe for the log.
    """
    t = law.draw(len(x), nets.teacher.schedule).to(double_device(x.device))
    with torch.no_grad():
        x_t = nets.teacher.schedule.perturb(x, t, torch.randn_like(x))
        d_real = nets.teacher(x_t, t, **batch.cond)
        d_fake = nets.critic(x_t, t, batch.cond)
        gradient = dm_gradient(x, d_real, d_fake)
        unweighted = 1 - dm_weighted(x, d_real).float().mean()  # equal scores are valid: a run starts with them
    return Terms(
        {"dm": inject_gradient(x, gradient)},
        stats={"dm_unweighted": unweighted},
        probe={"t": t, "x": x, "x_t": x_t, "d_real": d_real, "d_fake": d_fake},
    )


def dm_gradient(x: Tensor, d_real: Tensor, d_fake: Tensor) -> Tensor:
    """Compute DMD's distribution matching gradient on x, per sample:

        g = w_t alpha_t (s_fake - s_real) = (D_f - D_r) / mean|x - D_r|
        w_t = (sigma_t² / alpha_t²) / mean|x - D_r|

    Yin et al. 2024 (arXiv 2311.18828), eq. 7 and 8, where C S / ‖x - D_r‖₁ is the reciprocal mean over a sample's N values.
    The printed eq. 8 has sigma_t² / alpha_t, which leaves a factor alpha_t in g (1 for EDM's models). Here alpha_t and sigma_t
    cancel, as in the program of DMD2's authors. A sample whose weight 1 / mean|x - D_r| is not finite gets no gradient. If the
    fake score is not finite, neither is the gradient, so that the run stops.

    Args:
        x: samples [B, ...].
        d_real: D_r of the noised samples, shape of `x`.
        d_fake: D_f of the same, shape of `x`.

    Returns:
        The gradient, shape of `x`.
    """
    distance = unsqueeze_as(mean_abs(x - d_real), x)
    # the authors' nan_to_num turns an infinite weight into the largest float: a step of arbitrary size
    return torch.where(unsqueeze_as(dm_weighted(x, d_real), x), (d_fake - d_real) / distance, 0.0)


def dm_weighted(x: Tensor, d_real: Tensor) -> Tensor:
    """Samples [B] (bool) whose weight 1 / mean|x - D_r| in `dm_gradient` is finite; the others get no gradient."""
    distance = mean_abs(x - d_real)
    return torch.isfinite(1 / distance) & torch.isfinite(distance)


def inject_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Turn a gradient into a loss, ½ mean (x - sg(x - g))², whose gradient on x is g / (B N).

    Args:
        x: samples [B, ...].
        gradient: g, shape of `x`.

    Returns:
        The scalar loss; only its gradient has a meaning.
    """
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def sid_weight(x: Tensor, d_real: Tensor) -> Tensor:
    """Compute omega = 1 / mean|x - D_r| of SiD's loss, [B], without gradient; the mean is at least 1e-5, as in the authors' program."""
    with torch.no_grad():
        return 1 / mean_abs(x - d_real).clamp(min=1e-5)


def sid_loss(x: Tensor, d_real: Tensor, d_fake: Tensor, alpha: float, omega: Tensor | None = None) -> Tensor:
    """Compute SiD's generator loss per sample, summed over pixels (Zhou et al. 2024, arXiv 2404.04057, eq. 23):

        L = omega (D_r - D_f)·[(D_r - x) - alpha (D_r - D_f)]
          = omega [(1 - alpha) |a|² + (2 alpha - 1) a·b - alpha |b|²]     with a = D_r - x, b = D_f - x
        omega = 1 / mean|x - D_r|, without gradient: `sid_weight`

    The gradient reaches x directly, and through x_t in both networks, so `d_real` and `d_fake` must hold their graphs. With
    delta = D_r - D_f and the Jacobians J = dD/dx_t:

        dL/dx = omega [-delta + alpha_t J_rᵀ (a + (1 - 2 alpha) delta) - alpha_t J_fᵀ (a - 2 alpha delta)]

    whose first term is `dm_gradient`. The loss may be negative.

    Args:
        x: samples [B, ...].
        d_real: D_r of the noised samples, shape of `x`, with its graph.
        d_fake: D_f of the same, with its graph.
        alpha: weight of the second identity.
        omega: another weight of each sample [B]; None: `sid_weight`.

    Returns:
        Losses [B].
    """
    omega = sid_weight(x, d_real) if omega is None else omega
    difference = d_real - d_fake
    return omega * (difference * ((d_real - x) - alpha * difference)).flatten(1).sum(1)
