"""Denoisers: `D(x_t, t, **cond) -> x0`, whatever the network inside was trained to predict. Knows no method.

Every method of this package works on the expected clean sample, D(x_t, t) = E[x | x_t]. By Tweedie's formula it determines
the score (Vincent 2011; Efron 2011):

    score = (alpha_t D(x_t, t) - x_t) / sigma_t²

A denoiser never disables gradients: SiD differentiates through a frozen teacher.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fewstep.diffusion.noise import Schedule, unsqueeze_as

__all__ = ["Cond", "Denoiser", "denoising_loss", "feature_of", "score", "tap"]

Cond = Mapping[str, Tensor]
"""A condition: tensors by name; every tensor has the batch as its first dimension."""


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
