"""One player's float32 weights in the host's memory: the device keeps what networks compute with, the optimizer works here.

Ren et al. 2021 (ZeRO-Offload, arXiv 2101.06840). Between updates the device holds 2 bytes of weight a parameter (4 without
bfloat16), in the player's turn as many of gradient, and never moments or an average. Gradients come and weights go once an update, as
wide as they are on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["HostWeights"]


class HostWeights:
    """Float32 copies of the parameters of some modules, on the CPU.

    Args:
        modules: still in float32; they may be rounded (`fewstep.networks.placement`) and moved to the device afterwards.
        device: that one.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self.live = [parameter for module in modules for parameter in module.parameters()]
        self.weights = [nn.Parameter(parameter.detach().float().clone()) for parameter in self.live]
        self.device = device

    @torch.no_grad()
    def fetch_gradients(self) -> None:
        """Move the device's gradients to the weights here."""
        arriving = [
            None if live.grad is None else self._staging(live).copy_(live.grad, non_blocking=True) for live in self.live
        ]
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        for weight, live, gradient in zip(self.weights, self.live, arriving, strict=True):
            weight.grad = None if gradient is None else gradient.float()
            live.grad = None

    def give_weights(self) -> None:
        """Move the weights from here to the device."""
        self._give(self.weights)

    @contextmanager
    def replaced_by(self, weights: Iterable[Tensor]) -> Iterator[None]:
        """Compute on the device with other weights for a while, such as an average's: no second set takes room there."""
        self._give(weights)
        try:
            yield
        finally:
            self.give_weights()

    def state_of(self, module: nn.Module) -> dict[str, Tensor]:
        """`module.state_dict()`, with the weights that are kept here."""
        return module.state_dict() | {name: weight.detach() for name, weight in self._named(module)}

    @torch.no_grad()
    def load(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy the weights that `module` has just loaded, unrounded.

        Args:
            module: one of those, or a part of one.
            state: what it has loaded.
        """
        for name, weight in self._named(module):
            weight.copy_(state[name])

    @torch.no_grad()
    def _give(self, weights: Iterable[Tensor]) -> None:
        for weight, live in zip(weights, self.live, strict=True):
            # a staged copy, so that the weights here may change while it is still on its way
            live.copy_(self._staging(live).copy_(weight), non_blocking=True)

    def _staging(self, live: Tensor) -> Tensor:
        """Memory here that a copy to or from the device can use without waiting; PyTorch takes it back when that is done."""
        return torch.empty(live.shape, dtype=live.dtype, pin_memory=self.device.type == "cuda")

    def _named(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        kept = dict(zip(map(id, self.live), self.weights, strict=True))
        return [(name, kept[id(live)]) for name, live in module.named_parameters(remove_duplicate=False)]
