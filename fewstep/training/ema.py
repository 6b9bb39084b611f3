"""An exponential moving average of a network's weights, its half-life counted in images."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fewstep.system.distributed import shards

__all__ = ["Ema"]


class Ema:
    """Karras et al. 2024 (arXiv 2312.02696, section 3.1 on half-lives); ramp-up as in SiD and EDM.

    Args:
        module: the network that is trained; the average starts as its copy.
        half_life: images after which a weight's share has halved; 0: the current weights.
        ramp: the half-life is at most this share of the images seen so far (None: no ramp). SiD and EDM use 0.05.
        host: the average is in the host's memory.

    Attributes:
        module: the averaged network. With half-life 0 it is the trained network itself, which costs no memory; only with
            `host` a copy, in float32, since what is trained may then be rounded.
        own: whether it is a network of its own.
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
            module: the network that is trained.
            images: seen before this step.
            batch: images of this step.
            weights: its parameters as the optimizer keeps them, which may be in the host's memory; None: its own.
        """
        if not self.own:
            return
        half_life = self.half_life if self.ramp is None else min(self.half_life, self.ramp * images)
        keep = 0.5 ** (batch / half_life) if half_life > 0 else 0.0
        torch._foreach_lerp_(shards(self.module), shards(module) if weights is None else list(weights), 1 - keep)
        for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(other)
