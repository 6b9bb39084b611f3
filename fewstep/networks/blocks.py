"""Blocks: the repeated parts of a network, the units of checkpointing, compilation and sharding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn

__all__ = ["Blocked", "blocks_of"]


class Blocked(ABC):
    """Interface of a network that names its own blocks, for networks that the rule of `blocks_of` does not cover."""

    @abstractmethod
    def block_modules(self) -> Sequence[nn.Module]:
        """Blocks in the order of the forward; each is called as a module, and none is inside another."""


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Find the blocks of a network of any class.

    A block is a member of a container (`nn.ModuleList`, `nn.ModuleDict`, `nn.Sequential`, a module without a forward) that is
    not itself a container and has at least two layers with weights. If blocks inside a member hold more than half of its
    weights, they replace the member: the residual and transformer blocks of a UNet, not its levels. A `Blocked` network names
    its own blocks.

    Args:
        module: a network, or a module around it such as a denoiser.

    Returns:
        The blocks, none inside another; empty if there are none.
    """
    if isinstance(module, Blocked):
        return list(module.block_modules())
    found: list[nn.Module] = []
    for child in module.children():
        inner = blocks_of(child)
        member = _is_container(module) and not _is_container(child) and _layers(child) > 1
        found += [child] if member and 2 * _weights(*inner) <= _weights(child) else inner
    return list(dict.fromkeys(found))


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) or type(module).forward is nn.Module.forward


def _layers(module: nn.Module) -> int:
    return sum(any(True for _ in part.parameters(recurse=False)) for part in module.modules())


def _weights(*modules: nn.Module) -> int:
    return sum(value.numel() for value in {value for module in modules for value in module.parameters()})
