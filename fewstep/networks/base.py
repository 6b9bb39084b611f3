"""Interface of networks: a record of a network's shape, which builds the network. Knows no noise schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pydantic import Field
from torch import nn

from fewstep.system.tagged import Tagged

__all__ = ["NetSpec", "Normalised"]


class NetSpec(Tagged):
    """Interface of a network's record.

    The network is called as `net(x, label, labels=...)`: scaled noisy samples [B, *sample_shape], the noise schedule's label
    [B], and class indices [B] if there are classes. It returns a tensor with the shape of `x`.
    """

    kind: str
    num_classes: int = Field(0, ge=0)
    """Number of classes; the index one above them means "no class". 0: unconditional."""

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) of an image."""

    @property
    @abstractmethod
    def bottleneck(self) -> str:
        """Name of the layer whose output a GAN head reads: [B, C, H, W], [B, N, C] or [B, C]."""

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the network with newly initialised weights."""


class Normalised(nn.Module, ABC):
    """Interface of a layer whose weights are put back to unit norm after each step of an optimizer, and before the first."""

    @abstractmethod
    def normalise_(self) -> None:
        """Normalise the weights in place; what the layer computes stays the same."""
