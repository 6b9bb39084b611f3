"""One player's float32 weights in host memory: the device keeps compute weights, the optimizer steps on the host.

Ren et al. 2021 (ZeRO-Offload, arXiv 2101.06840). Per parameter the device holds 2 bytes of weight (4 without bfloat16) and,
during the player's update, as many of gradient, but never moments or an average. Gradients and weights are transferred once
per update, in the device's precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["HostWeights"]


class HostWeights:
    """Float32 copies of modules' parameters, on the CPU.

    Args:
        modules: in float32; they may be rounded (`fewstep.networks.placement`) and moved to the device afterwards.
        device: the device of the modules.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self.live = [parameter for module in modules for parameter in module.parameters()]
        self.weights = [nn.Parameter(parameter.detach().float().clone()) for parameter in self.live]
        self.device = device

    @torch.no_grad()
    def fetch_gradients(self) -> None:
        """Move the device's gradients to the host's weights."""
        arriving = [
            None if live.grad is None else self._staging(live).copy_(live.grad, non_blocking=True) for live in self.live
        ]
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        for weight, live, gradient in zip(self.weights, self.live, arriving, strict=True):
            weight.grad = None if gradient is None else gradient.float()
            live.grad = None

    def give_weights(self) -> None:
        """Copy the host's weights to the device."""
        self._give(self.weights)

    @contextmanager
    def replaced_by(self, weights: Iterable[Tensor]) -> Iterator[None]:
        """Compute temporarily with other weights, such as the average, without a second set on the device."""
        self._give(weights)
        try:
            yield
        finally:
            self.give_weights()

    def state_of(self, module: nn.Module) -> dict[str, Tensor]:
        """Return `module.state_dict()` with the host's float32 weights."""
        return module.state_dict() | {name: weight.detach() for name, weight in self._named(module)}

    @torch.no_grad()
    def load(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy the unrounded weights that `module` has just loaded.

        Args:
            module: one of the modules, or a part of one.
            state: the loaded state.
        """
        for name, weight in self._named(module):
            weight.copy_(state[name])

    @torch.no_grad()
    def _give(self, weights: Iterable[Tensor]) -> None:
        for weight, live in zip(weights, self.live, strict=True):
            # a staged copy, so that the host's weights may change during the transfer
            live.copy_(self._staging(live).copy_(weight), non_blocking=True)

    def _staging(self, live: Tensor) -> Tensor:
        """Pinned host memory for an asynchronous copy; PyTorch reuses it after the copy."""
        return torch.empty(live.shape, dtype=live.dtype, pin_memory=self.device.type == "cuda")

    def _named(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        kept = dict(zip(map(id, self.live), self.weights, strict=True))
        return [(name, kept[id(live)]) for name, live in module.named_parameters(remove_duplicate=False)]
