"""Exponential moving average (EMA) of a network's weights, with a half-life in images."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.system.distributed import shards

__all__ = ["Ema"]


class Ema:
    """Averaged weights, as in SiD and EDM (half-lives: Karras et al. 2024, arXiv 2312.02696, section 3.1):

        average <- beta average + (1 - beta) weights    with beta = 0.5^(batch / half-life), half-life <= ramp images

    Args:
        module: the trained network; the average starts as its copy.
        half_life: images after which a weight's share has halved; 0: no averaging.
        ramp: the half-life is at most this share of the images seen so far (None: no ramp). SiD and EDM use 0.05.
        host: keep the average in host memory.

    Attributes:
        module: the averaged network. With half-life 0 it is the trained network itself, which costs no memory. With `host`
            it is always a float32 copy, because the trained weights may be rounded.
        own: whether `module` is a copy.
    """

    def __init__(self, module: nn.Module, half_life: float, ramp: float | None = 0.05, host: bool = False) -> None:
        self.half_life, self.ramp = half_life, ramp
        self.own = half_life > 0 or host
        self.module = copy.deepcopy(module).requires_grad_(False).eval() if self.own else module
        if host:
            self.module.to("cpu")

    @torch.no_grad()
    def update(self, module: nn.Module, images: int, batch: int, weights: Sequence[Tensor] | None = None) -> None:
        """Move the average towards `module`.

        Args:
            module: the trained network.
            images: images seen before this step.
            batch: images of this step.
            weights: the optimizer's parameters, possibly in host memory; None: the module's own.
        """
        if not self.own:
            return
        half_life = self.half_life if self.ramp is None else min(self.half_life, self.ramp * images)
        keep = 0.5 ** (batch / half_life) if half_life > 0 else 0.0
        torch._foreach_lerp_(shards(self.module), shards(module) if weights is None else list(weights), 1 - keep)
        for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(other)
