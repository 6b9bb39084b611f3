"""A small convolutional U-Net for images of up to about 64 pixels a side, tuned for CPUs. Knows no noise schedule.

The residual blocks are those of Dhariwal & Nichol 2021 (arXiv 2105.05233, ADM: the condition scales and shifts the
second norm). Departures, each for speed on two CPU cores (LOG.md): the image is folded into 2x2 patches before the
first convolution, so that nothing runs at full resolution; skips are added, not concatenated; one attention layer at
the lowest resolution.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from fewstep.networks.base import NetSpec
from fewstep.networks.blocks import Blocked
from fewstep.networks.dit import NoiseEmbedding

__all__ = ["UNet", "UNetSpec"]


class UNetSpec(NetSpec):
    """Shape of a small U-Net."""

    kind: Literal["unet"] = "unet"
    size: int = Field(28, gt=0)
    """Image height and width in pixels; a multiple of 2 to the number of levels."""
    channels: int = Field(1, gt=0)
    """Image channels."""
    widths: tuple[PositiveInt, ...] = Field((48, 96), min_length=1)
    """Channels of each level, from half resolution down; multiples of 8."""
    blocks: int = Field(1, gt=0)
    """Residual blocks per level in the encoder, and as many in the decoder."""
    heads: int = Field(2, gt=0)
    """Attention heads at the lowest resolution."""
    num_classes: int = Field(10, ge=0)
    """Number of classes; one more embedding stands for "no class"."""

    @model_validator(mode="after")
    def _divisible(self) -> UNetSpec:
        if self.size % 2 ** len(self.widths):
            raise ValueError(
                f"`size` must be a multiple of {2 ** len(self.widths)} for {len(self.widths)} levels, got {self.size}"
            )
        if any(width % 8 for width in self.widths) or self.widths[-1] % self.heads:
            raise ValueError(
                f"`widths` must be multiples of 8, the last one of heads {self.heads}, got {list(self.widths)}"
            )
        return self

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.channels, self.size, self.size

    @property
    def bottleneck(self) -> str:
        """Layer that a GAN head reads: the encoder's end, after attention."""
        return "attention"

    def build(self) -> UNet:
        """Build the network with newly initialised weights."""
        return UNet(self)


class UNet(nn.Module, Blocked):
    """2x2 patches -> encoder -> attention -> decoder with added skips -> pixels.

    `forward(x, label, labels)` -> tensor of the shape of `x`.
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        widths, embedding = spec.widths, 2 * spec.widths[-1]
        self.noise_embedding = NoiseEmbedding(embedding)
        self.class_embedding = nn.Embedding(spec.num_classes + 1, embedding)
        self.conv_in = nn.Conv2d(4 * spec.channels, widths[0], 3, padding=1)

        def level(width: int) -> nn.ModuleList:
            return nn.ModuleList(ResBlock(width, embedding) for _ in range(spec.blocks))

        self.encoder = nn.ModuleList(level(width) for width in widths)
        self.down = nn.ModuleList(nn.Conv2d(fine, coarse, 2, stride=2) for fine, coarse in itertools.pairwise(widths))
        self.attention = Attention(widths[-1], spec.heads)
        self.decoder = nn.ModuleList(level(width) for width in widths)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in itertools.pairwise(widths)
        )
        self.norm_out = nn.GroupNorm(widths[0] // 8, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 4 * spec.channels, 3, padding=1)
        for weight in self.conv_out.parameters():
            nn.init.zeros_(weight)

    def block_modules(self) -> list[nn.Module]:
        """The residual blocks and the attention, which stands alone."""
        return [*itertools.chain(*self.encoder), self.attention, *itertools.chain(*self.decoder)]

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
        skips = []
        for depth, blocks in enumerate(self.encoder):
            for block in blocks.children():
                h = block(h, condition)
            if depth < len(self.down):
                skips.append(h)
                h = self.down[depth](h)
        h = self.attention(h)
        for depth, blocks in reversed(list(enumerate(self.decoder))):
            if depth < len(self.up):
                h = self.up[depth](h) + skips.pop()
            for block in blocks.children():
                h = block(h, condition)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), 2)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a residual; the condition scales and shifts the second norm."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(width // 8, width)
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * width)
        self.norm_mid = nn.GroupNorm(width // 8, width, affine=False)
        self.conv_mid = nn.Conv2d(width, width, 3, padding=1)
        for weight in (*self.modulation.parameters(), *self.conv_mid.parameters()):
            nn.init.zeros_(weight)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """`h` [B, C, H, W], `condition` [B, embedding] -> [B, C, H, W]."""
        shift, scale = self.modulation(condition)[..., None, None].chunk(2, dim=1)
        inner = self.norm_mid(self.conv_in(F.silu(self.norm_in(h))))
        return h + self.conv_mid(F.silu(torch.addcmul(shift, inner, 1 + scale)))


class Attention(nn.Module):
    """Self-attention over the positions of a feature map, around a residual. [B, C, H, W] -> the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(width // 8, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, h: Tensor) -> Tensor:
        b, c, height, width = h.shape
        tokens = self.norm(h).permute(0, 2, 3, 1).reshape(b, height * width, c)
        q, k, v = self.qkv(tokens).view(b, -1, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        # written out: the fused kernel's CPU backward is twice as slow at some fifty positions (LOG.md)
        weights = (q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5).softmax(dim=-1)
        attended = self.proj((weights @ v).transpose(1, 2).reshape(b, -1, c))
        return h + attended.view(b, height, width, c).permute(0, 3, 1, 2)
