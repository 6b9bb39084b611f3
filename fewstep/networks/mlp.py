"""A residual MLP for points and tiny vectors: the trainable side of the analytic mixture teacher."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from fewstep.networks.base import NetSpec

__all__ = ["MLP", "MLPSpec"]


class MLPSpec(NetSpec):
    """Shape of a residual MLP."""

    kind: Literal["mlp"] = "mlp"
    shape: tuple[PositiveInt, ...] = Field((2,), min_length=1)
    """Shape of one sample."""
    width: int = Field(128, gt=0)
    """Hidden units."""
    depth: int = Field(3, gt=0)
    """Residual blocks."""
    num_classes: int = Field(0, ge=0)
    """Number of classes; 0 for none."""
    label_scale: float = Field(1.0, gt=0)
    """Factor on noise labels before embedding: labels of tables and flows reach 1000, EDM's are about 1."""

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.shape

    @property
    def bottleneck(self) -> str:
        """Layer that a GAN head reads."""
        return f"blocks.{self.depth - 1}"

    def build(self) -> MLP:
        """Build the network with newly initialised weights."""
        return MLP(self)


class MLP(nn.Module):
    """`forward(x, label, labels)` -> tensor of the shape of `x`."""

    def __init__(self, spec: MLPSpec) -> None:
        super().__init__()
        self.spec = spec
        size = math.prod(spec.shape)
        self.lift = nn.Linear(size, spec.width)
        self.noise_embedding = nn.Sequential(nn.Linear(1, spec.width), nn.SiLU(), nn.Linear(spec.width, spec.width))
        self.class_embedding = nn.Embedding(spec.num_classes + 1, spec.width)
        self.blocks = nn.ModuleList(MLPBlock(spec.width) for _ in range(spec.depth))
        self.out = nn.Linear(spec.width, size)

    def forward(self, x: Tensor, label: Tensor, labels: Tensor | None = None) -> Tensor:
        """Run the network on `x` [B, *shape], noise labels [B] and classes [B] (None: the empty class)."""
        if labels is None:
            labels = torch.full((x.shape[0],), self.spec.num_classes, device=x.device)
        hidden = self.lift(x.flatten(1))
        condition = self.noise_embedding(self.spec.label_scale * label.float()[:, None]) + self.class_embedding(labels)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.out(F.silu(hidden)).reshape(x.shape)


class MLPBlock(nn.Module):
    """A residual hidden layer, shifted by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.condition = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """`hidden`, `condition` [B, width] -> [B, width]."""
        return hidden + self.outer(F.silu(self.inner(F.silu(hidden)) + self.condition(condition)))
