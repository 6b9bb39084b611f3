"""Denoisers: `D(x_t, t, **cond) -> x0`, whatever the network inside was trained to predict. Knows no method.

Every method of this package works on the expected clean sample, D(x_t, t) = E[x | x_t]. By Tweedie's formula it determines
the score (Vincent 2011; Efron 2011):

    score = (alpha_t D(x_t, t) - x_t) / sigma_t²

A denoiser never disables gradients: SiD differentiates through a frozen teacher.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fewstep.diffusion.noise import Schedule, unsqueeze_as

__all__ = [
    "Cond", "Denoiser", "Guided", "Preconditioned", "Prediction", "denoising_loss", "feature_of", "output_of", "score", "tap",
]  # fmt: skip

Cond = Mapping[str, Tensor]
"""A condition: tensors by name; every tensor has the batch as its first dimension."""

Prediction = Literal["edm", "eps", "v", "x0", "flow"]

# the value that must be 1 at all times under a prediction's schedule; eps and x0 fit every schedule
FITS: dict[Prediction, Callable[[float, float], float]] = {
    "edm": lambda alpha, sigma: alpha,
    "v": lambda alpha, sigma: alpha**2 + sigma**2,
    "flow": lambda alpha, sigma: alpha + sigma,
}
NO_SIGNAL = 1e-6  # alpha; rounding leaves 6e-17 at the end of a zero-SNR table


class Denoiser(nn.Module, ABC):
    """Interface of a denoiser: a noisy sample and a time -> the expected clean sample."""

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

    def residual(self, x: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        """Prediction error on noised samples, in the units of this denoiser's training; the denoising loss squares it.

        This default is for a denoiser that predicts x0 itself: D(x_t, t) - x.

        Args:
            x: clean samples [B, ...].
            t: normalised times [B].
            eps: unit Gaussian noise, shape of `x`.
            cond: the condition; each tensor [B, ...].

        Returns:
            The error in float32, shape of `x`.
        """
        return self(self.schedule.perturb(x, t, eps), t, **cond) - x


def denoising_loss(denoiser: Denoiser, x: Tensor, t: Tensor, eps: Tensor, cond: Cond) -> Tensor:
    """Denoising loss: mean squared residual over all elements (Karras et al. 2022, eq. 2; Ho et al. 2020, eq. 14).

        L = mean residual(x, t, eps)² = mean (D(x_t, t) - x)² / c_out²

    The code does not divide by c_out, which is 0 at t = 0 of a flow and of a table whose first alpha-bar is 1.

    Args:
        denoiser: D.
        x: clean samples [B, ...].
        t: normalised times [B] within the schedule.
        eps: unit Gaussian noise, shape of `x`.
        cond: the condition; each tensor [B, ...].

    Returns:
        A scalar with gradient.
    """
    return denoiser.residual(x, t, eps, **cond).square().mean()


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

        with s = sigma_t and sd = sigma_data. All of these are trained with the squared error of F (`residual`). On x0
        this error has the weight 1 / c_out² (for edm 1/s² + 1/sd²).

    Args:
        net: called as `net(c_in x_t, label, **cond)`; its output is converted to float32.
        schedule: noise levels, and the label that the network receives for each.
        prediction: what the network predicts.
        sigma_data: standard deviation of the data, for "edm".

        edm, v and flow require a schedule with alpha = 1, alpha² + sigma² = 1 and alpha + sigma = 1, respectively.
        Under another schedule, D differs from x0 even for a perfect network.

    Raises:
        ValueError: the prediction does not fit the schedule, or is eps under a schedule that ends at alpha = 0, where
            x0 = (x_t - sigma eps) / alpha is undefined.
    """

    def __init__(
        self, net: nn.Module, schedule: Schedule, prediction: Prediction = "edm", sigma_data: float = 0.5
    ) -> None:
        super().__init__()
        self.net, self.schedule, self.prediction, self.sigma_data = net, schedule, prediction, sigma_data
        if prediction in FITS:
            alpha_t, sigma_t = (c.item() for c in schedule.alpha_sigma(torch.tensor([0.5], device="cpu")))
            fits = [name for name, rule in FITS.items() if abs(rule(alpha_t, sigma_t) - 1) < 1e-3]
            if prediction not in fits:
                raise ValueError(
                    f"prediction `{prediction}` must have its own schedule (edm: karras, v: discrete, flow: flow), got "
                    f"{type(schedule).__name__}, under which x0 would be wrong. Try: prediction `{(*fits, 'x0')[0]}`"
                )
        if prediction == "eps" and schedule.alpha_sigma(torch.ones(1, device="cpu"))[0].item() < NO_SIGNAL:
            raise ValueError(
                "prediction `eps` must have signal left at the noisiest step, got a schedule that ends at alpha = 0 (zero terminal "
                "SNR), where eps does not determine x0. Try: prediction `v`, which such models are trained with"
            )

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients c_skip, c_out, c_in at times `t`; each [B], float32."""
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

    def target(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Compute the network's target at `alpha_t x + sigma_t eps`: F with D = x, solved for each prediction, [B, ...].

        edm: (s x - sd² eps) / (sd √(s² + sd²)); eps: eps; v: alpha eps - sigma x; x0: x; flow: eps - x.
        """
        alpha_t, sigma_t = (unsqueeze_as(c, x) for c in self.schedule.alpha_sigma(t))
        match self.prediction:
            case "edm":
                total = sigma_t**2 + self.sigma_data**2
                return (sigma_t * x - self.sigma_data**2 * eps) / (self.sigma_data * total.sqrt())
            case "eps":
                return eps
            case "v":
                return alpha_t * eps - sigma_t * x
            case "x0":
                return x
            case "flow":
                return eps - x
        raise ValueError(f"prediction {self.prediction!r} is unknown: use one of edm, eps, v, x0, flow")

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        c_skip, c_out, c_in = (unsqueeze_as(c, x_t) for c in self.coefficients(t))
        output = self.net(c_in * x_t, self.schedule.label(t), **cond)
        return c_skip * x_t + c_out * output.float()

    def residual(self, x: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        return output_of(self, self.schedule.perturb(x, t, eps), t, cond) - self.target(x, t, eps)

    def loss_weight(self, t: Tensor) -> Tensor:
        """Weight 1 / c_out² [B] of the squared x0 error in the denoising loss; infinite if c_out is 0."""
        return 1 / self.coefficients(t)[1] ** 2


def output_of(denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """Output F of a denoiser's layer `net` in one full call, in float32, shape of `x_t`.

    A full call runs the hooks on the denoiser (FSDP's, a GAN head's, counters).
    """
    with tap(denoiser, "net") as outputs:
        denoiser(x_t, t, **cond)
    return outputs[0].float()


class Guided(Denoiser):
    """Classifier-free guidance as a denoiser (Ho & Salimans 2022, arXiv 2207.12598, eq. 6):

        D(x_t, t) = D_null(x_t, t) + scale (D_cond(x_t, t) - D_null(x_t, t))

    Both halves run through the network in one batch. Guiding x0 equals guiding eps or v, because each is an affine function
    of the others.

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
        return self._guide(self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), **self._both(cond)))

    def residual(self, x: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        twice = (torch.cat([value, value]) for value in (x, t, eps))
        return self._guide(
            self.denoiser.residual(*twice, **self._both(cond))
        )  # affine: the weights 1 - scale and scale sum to 1

    def _both(self, cond: Cond) -> dict[str, Tensor]:
        empty = self.null(cond)
        return {name: torch.cat([cond[name], empty[name]]) for name in cond}

    def _guide(self, both: Tensor) -> Tensor:
        conditional, unconditional = both.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)


def score(denoised: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Score of the noised marginal, (alpha_t D - x_t) / sigma_t² (Tweedie's formula; alpha_t, sigma_t: [B])."""
    return (unsqueeze_as(alpha_t, x_t) * denoised - x_t) / unsqueeze_as(sigma_t, x_t) ** 2


@contextmanager
def tap(module: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Record the output of the submodule `name` in every forward within the block.

    Yields a list that grows by one feature per forward. Raises ValueError if there is no such submodule.
    """
    features: list[Tensor] = []
    handle = _submodule(module, name).register_forward_hook(lambda _, inputs, output: features.append(output))
    try:
        yield features
    finally:
        handle.remove()


def feature_of(module: nn.Module, name: str, *inputs: Tensor, **cond: Tensor) -> Tensor:
    """Output of the submodule `name`, from a forward that stops there.

    A network that is split over processes runs to its end, because FSDP must gather its parts in the same order each time.

    Raises:
        ValueError: there is no such submodule, or the forward does not reach it.
    """

    if isinstance(getattr(module, "base", module), FSDPModule):  # `base`: adapters on a split network
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
    """Signal that carries a feature out of a forward."""

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
