"""Denoisers: `D(x_t, t, **cond) -> x0`, whatever the network inside was trained to predict. Knows no method.

Every method of this package works on the clean sample that a denoiser expects, E[x | x_t]; by Tweedie's formula that is
the score, `score = (alpha_t D(x_t, t) - x_t) / sigma_t²` (Vincent 2011; Efron 2011), so nothing is lost.
A denoiser never disables gradients itself: SiD differentiates through a frozen teacher.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fewstep.noise import Schedule, unsqueeze_as

__all__ = ["Cond", "Denoiser", "Guided", "Preconditioned", "Prediction", "View", "feature_of", "score", "tap"]

Cond = Mapping[str, Tensor]
"""What a sample is conditioned on, by name; every tensor has the batch as its first dimension."""

Prediction = Literal["edm", "eps", "v", "x0", "flow"]


class Denoiser(nn.Module, ABC):
    """Takes a noisy sample and a time, returns the clean sample it expects."""

    schedule: Schedule

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """E[x | x_t].

        Args:
            x_t: noisy samples [B, ...], as `schedule.perturb` makes them.
            t: normalised times [B].
            cond: the condition; each tensor [B, ...].

        Returns:
            Clean samples in float32, shape of `x_t`.
        """

    @abstractmethod
    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight [B] of the squared x0 error at times `t` [B] in the denoising loss this denoiser was trained with."""


class Preconditioned(Denoiser):
    """A network and the four coefficients that turn its output F into x0 (Karras et al. 2022, eq. 7):

        D(x_t, t) = c_skip x_t + c_out F(c_in x_t, c_noise)

    ============ ==================== ===================== ================ ==========================================
    prediction   c_skip               c_out                 c_in             source
    ============ ==================== ===================== ================ ==========================================
    edm          sd² / (s² + sd²)     s sd / √(s² + sd²)    1 / √(s² + sd²)  Karras et al. 2022, table 1 (alpha = 1)
    eps          1 / alpha            -sigma / alpha        1                Ho et al. 2020, eq. 15
    v            alpha                -sigma                1                Salimans & Ho 2022, appendix D
    x0           0                    1                     1
    flow         1                    -sigma                1                x_t = (1-u) x + u eps, F = eps - x
    ============ ==================== ===================== ================ ==========================================

    with s = sigma_t and sd = sigma_data. `loss_weight` is 1 / c_out²: the plain squared error in the network's own
    output, which is what all of these were trained with (for edm it equals 1/s² + 1/sd²).

    Args:
        net: called as `net(c_in x_t, label, **cond)`; its output is taken to float32.
        schedule: where the noise levels lie, and what label the network is told.
        prediction: what the network predicts.
        sigma_data: standard deviation of the data, for "edm".
    """

    def __init__(
        self, net: nn.Module, schedule: Schedule, prediction: Prediction = "edm", sigma_data: float = 0.5
    ) -> None:
        super().__init__()
        self.net, self.schedule, self.prediction, self.sigma_data = net, schedule, prediction, sigma_data

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in at times `t`; each [B], float32."""
        alpha_t, sigma_t = self.schedule.alpha_sigma(t)
        one = torch.ones_like(sigma_t)
        match self.prediction:
            case "edm":
                total = sigma_t**2 + self.sigma_data**2
                return self.sigma_data**2 / total, sigma_t * self.sigma_data / total.sqrt(), 1 / total.sqrt()
            case "eps":
                return 1 / alpha_t, -sigma_t / alpha_t, one
            case "v":
                return alpha_t, -sigma_t, one
            case "x0":
                return 0 * one, one, one
            case "flow":
                return one, -sigma_t, one
        raise ValueError(f"prediction {self.prediction!r} is unknown: use one of edm, eps, v, x0, flow")

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        c_skip, c_out, c_in = (unsqueeze_as(c, x_t) for c in self.coefficients(t))
        output = self.net(c_in * x_t, self.schedule.label(t), **cond)
        return c_skip * x_t + c_out * output.float()

    def loss_weight(self, t: Tensor) -> Tensor:
        return 1 / self.coefficients(t)[1] ** 2


class Guided(Denoiser):
    """Classifier-free guidance as a denoiser: D_null + scale (D_cond - D_null) (Ho & Salimans 2022, eq. 6).

    Both halves go through the network in one batch. Guiding x0 equals guiding eps or v: all are affine in one another.

    Args:
        denoiser: the conditional denoiser.
        null: maps a condition to the empty condition of the same batch.
        scale: 1 is no guidance.
    """

    def __init__(self, denoiser: Denoiser, null: Callable[[Cond], Cond], scale: float) -> None:
        super().__init__()
        self.denoiser, self.null, self.scale = denoiser, null, scale
        self.schedule = denoiser.schedule

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        empty = self.null(cond)
        both = {name: torch.cat([cond[name], empty[name]]) for name in cond}
        conditional, unconditional = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), **both).chunk(2)
        return unconditional + self.scale * (conditional - unconditional)

    def loss_weight(self, t: Tensor) -> Tensor:
        return self.denoiser.loss_weight(t)


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

    def loss_weight(self, t: Tensor) -> Tensor:
        return self.denoiser.loss_weight(self._translate(t)[0])


def score(denoised: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """The score of the noised marginal, (alpha_t D - x_t) / sigma_t² (Tweedie's formula; alpha_t, sigma_t: [B])."""
    return (unsqueeze_as(alpha_t, x_t) * denoised - x_t) / unsqueeze_as(sigma_t, x_t) ** 2


@contextmanager
def tap(module: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Record the output of the submodule `name` in every forward within the block, without touching the forward.

    Yields a list that grows by one feature a forward. Raises ValueError if there is no such submodule.
    """
    features: list[Tensor] = []
    handle = _submodule(module, name).register_forward_hook(lambda _, inputs, output: features.append(output))
    try:
        yield features
    finally:
        handle.remove()


def feature_of(module: nn.Module, name: str, *inputs: Tensor, **cond: Tensor) -> Tensor:
    """The output of the submodule `name` in a forward that ends there: what comes after it is not computed.

    A network that is split over processes runs to its end: its parts must be met in the same order each time.

    Raises:
        ValueError: there is no such submodule, or the forward does not reach it.
    """

    if isinstance(getattr(module, "base", module), FSDPModule):  # adapters run on a network that is split
        with tap(module, name) as features:
            module(*inputs, **cond)
        if features:
            return features[0]
        raise ValueError(f"the forward of {type(module).__name__} does not pass through its layer {name!r}")

    def stop(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        raise _Reached(output)

    handle = _submodule(module, name).register_forward_hook(stop)
    try:
        module(*inputs, **cond)
    except _Reached as reached:
        return reached.feature
    finally:
        handle.remove()
    raise ValueError(f"the forward of {type(module).__name__} does not pass through its layer {name!r}")


class _Reached(Exception):
    """Carries a feature out of a forward. No error."""

    def __init__(self, feature: Tensor) -> None:
        super().__init__()
        self.feature = feature


def _submodule(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        children = ", ".join(child for child, _ in module.named_children())
        raise ValueError(
            f"no layer {name!r} to read features from in {type(module).__name__}: it has {children}"
        ) from None
