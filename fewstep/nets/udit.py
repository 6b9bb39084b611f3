"""A transformer between a convolutional encoder and decoder, for small images on CPUs. Knows no noise schedule.

Convolutions at half resolution draw what lies within a patch, with a skip past the transformer; the transformer, at an
eighth or a quarter of it, places things. The idea is that of U-ViT's and hybrid diffusion backbones (Bao et al. 2023, arXiv 2209.12152;
Hoogeboom et al. 2023, arXiv 2301.11093): most width where there are few positions.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from fewstep.nets.dit import Block, NoiseEmbedding, modulated_norm

__all__ = ["UDiT", "UDiTSpec"]


class UDiTSpec(BaseModel):
    """Shape of a convolution-transformer hybrid."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["udit"] = "udit"
    size: int = Field(28, gt=0)
    """Image height and width in pixels, a multiple of 4."""
    channels: int = Field(1, gt=0)
    """Image channels."""
    stem: int = Field(32, gt=0, multiple_of=8)
    """Channels of the convolutions at half resolution."""
    stem_depth: int = Field(1, gt=0)
    """Residual blocks in each of encoder and decoder."""
    width: int = Field(128, gt=0)
    """Channels of a token at quarter resolution."""
    depth: int = Field(6, gt=0)
    """Number of transformer blocks."""
    heads: int = Field(4, gt=0)
    """Attention heads."""
    mlp_ratio: int = Field(4, gt=0)
    """Hidden units of a block's MLP, in widths."""
    num_classes: int = Field(10, ge=0)
    """Number of classes; one more embedding stands for "no class"."""

    @model_validator(mode="after")
    def _divisible(self) -> UDiTSpec:
        if self.size % 4:
            raise ValueError(f"size {self.size} is not a multiple of 4")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.channels, self.size, self.size

    @property
    def bottleneck(self) -> str:
        """The layer that a GAN head reads."""
        return f"blocks.{(2 * self.depth + 2) // 3 - 1}"

    def build(self) -> UDiT:
        """The network, freshly initialised."""
        return UDiT(self)


class UDiT(nn.Module):
    """`forward(x, label, labels)` -> tensor of the shape of `x`."""

    def __init__(self, spec: UDiTSpec) -> None:
        super().__init__()
        self.spec = spec
        stem, width = spec.stem, spec.width
        self.noise_embedding = NoiseEmbedding(width)
        self.class_embedding = nn.Embedding(spec.num_classes + 1, width)
        self.conv_in = nn.Conv2d(4 * spec.channels, stem, 3, padding=1)
        self.encoder = nn.ModuleList(ConvBlock(stem, width) for _ in range(spec.stem_depth))
        self.down = nn.Linear(4 * stem, width)
        self.position = nn.Parameter(torch.randn(1, (spec.size // 4) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, spec.heads, spec.mlp_ratio) for _ in range(spec.depth))
        self.modulation_out = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 4 * stem)
        self.decoder = nn.ModuleList(ConvBlock(stem, width) for _ in range(spec.stem_depth))
        self.norm_out = nn.GroupNorm(stem // 8, stem)
        self.conv_out = nn.Conv2d(stem, 4 * spec.channels, 3, padding=1)
        for layer in (self.modulation_out, self.conv_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, label: Tensor, labels: Tensor | None = None) -> Tensor:
        """Run the network.

        Args:
            x: scaled noisy images [B, C, H, W].
            label: noise label [B], of the order of one (EDM's c_noise).
            labels: class of each image [B], int64; `num_classes` is the empty class. None: all empty.

        Returns:
            The prediction F [B, C, H, W], in the compute dtype.
        """
        if labels is None:
            labels = torch.full((x.shape[0],), self.spec.num_classes, device=x.device)
        condition = F.silu(self.noise_embedding(label) + self.class_embedding(labels))
        h = self.conv_in(F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last))
        for block in self.encoder:
            h = block(h, condition)
        skip, side = h, self.spec.size // 4
        tokens = self.down(F.pixel_unshuffle(h, 2).flatten(2).transpose(1, 2))
        tokens = tokens + self.position.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation_out(condition).unsqueeze(1).chunk(2, dim=-1)
        fine = self.up(modulated_norm(tokens, shift, scale)).transpose(1, 2).unflatten(2, (side, side))
        h = skip + F.pixel_shuffle(fine, 2).contiguous(memory_format=torch.channels_last)
        for block in self.decoder:
            h = block(h, condition)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), 2)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, the second modulated by the condition, around a residual."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(channels // 8, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * channels)
        self.norm_mid = nn.GroupNorm(channels // 8, channels)
        self.conv_mid = nn.Conv2d(channels, channels, 3, padding=1)
        for layer in (self.modulation, self.conv_mid):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """`h` [B, C, H, W], `condition` [B, width] -> [B, C, H, W]."""
        shift, scale = self.modulation(condition)[..., None, None].chunk(2, dim=1)
        inner = self.conv_in(F.silu(self.norm_in(h)))
        inner = torch.addcmul(shift, self.norm_mid(inner), 1 + scale)
        return h + self.conv_mid(F.silu(inner))
