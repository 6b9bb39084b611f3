"""One player's float32 weights in the host's memory: the device keeps what networks compute with, the optimizer works here.

Ren et al. 2021 (ZeRO-Offload, arXiv 2101.06840). Per parameter the device holds 2 bytes of weight (4 without bfloat16) and as
many of gradient, instead of 16 with Adam's moments and the averaged weights. Gradients come and weights go once an update.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["HostWeights"]


class HostWeights:
    """Float32 copies of the parameters of some modules, on the CPU.

    Args:
        modules: still in float32; they may be rounded (`fewstep.nets.narrow`) and moved to the device afterwards.
        device: that one.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self.live = [parameter for module in modules for parameter in module.parameters()]
        here = dict(dtype=torch.float32, pin_memory=device.type == "cuda")
        self.weights = [nn.Parameter(torch.empty(p.shape, **here).copy_(p.detach())) for p in self.live]
        self._gradients = [torch.empty(p.shape, **here) for p in self.live]

    @torch.no_grad()
    def fetch_gradients(self) -> None:
        """Move the device's gradients to the weights here."""
        for weight, gradient, live in zip(self.weights, self._gradients, self.live, strict=True):
            weight.grad = None if live.grad is None else gradient.copy_(live.grad, non_blocking=True)
        if self.live[0].is_cuda:
            torch.cuda.current_stream(self.live[0].device).synchronize()
        for live in self.live:
            live.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Move the weights from here to the device."""
        for weight, live in zip(self.weights, self.live, strict=True):
            live.copy_(weight, non_blocking=True)  # done before the next gradients come, so before these change again

    def state_of(self, module: nn.Module) -> dict[str, Tensor]:
        """`module.state_dict()`, with the weights that are kept here."""
        return module.state_dict() | {name: weight.detach() for name, weight in self._named(module)}

    @torch.no_grad()
    def adopt(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Take over the weights that `module` has just loaded, unrounded.

        Args:
            module: one of those, or a part of one.
            state: what it has loaded.
        """
        for name, weight in self._named(module):
            weight.copy_(state[name])

    def _named(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        here = dict(zip(map(id, self.live), self.weights, strict=True))
        return [(name, here[id(live)]) for name, live in module.named_parameters(remove_duplicate=False)]
