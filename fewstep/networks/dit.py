"""A small diffusion transformer for images of up to about a thousand patches, tuned for CPUs. Knows no noise schedule.

Peebles & Xie 2023 (arXiv 2212.09748) with adaLN-zero conditioning. Departures, each measured on two CPU cores (LOG.md):
attention is explicit (unfused), because the fused kernel's CPU backward is twice as slow at some fifty tokens, and the
MLP uses SiLU, which is cheaper on CPUs than GELU.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.networks.base import NetSpec

__all__ = ["DiT", "DiTSpec"]


class DiTSpec(NetSpec):
    """Shape of a small diffusion transformer."""

    kind: Literal["dit"] = "dit"
    size: int = Field(28, gt=0)
    """Image height and width in pixels."""
    channels: int = Field(1, gt=0)
    """Image channels."""
    patch: int = Field(4, gt=0)
    """Side of a token in pixels."""
    width: int = Field(128, gt=0)
    """Channels per token."""
    depth: int = Field(6, gt=0)
    """Number of transformer blocks."""
    heads: int = Field(4, gt=0)
    """Attention heads."""
    mlp_ratio: int = Field(4, gt=0)
    """Hidden units of a block's MLP as a multiple of `width`."""
    num_classes: int = Field(10, ge=0)
    """Number of classes; one more embedding stands for "no class"."""

    @model_validator(mode="after")
    def _divisible(self) -> DiTSpec:
        if self.size % self.patch:
            raise ValueError(f"`size` must be a multiple of patch {self.patch}, got {self.size}")
        if self.width % self.heads:
            raise ValueError(f"`width` must be a multiple of heads {self.heads}, got {self.width}")
        return self

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.channels, self.size, self.size

    @property
    def bottleneck(self) -> str:
        """Layer that a GAN head reads: at two thirds of the depth, where features are most abstract."""
        return f"blocks.{(2 * self.depth + 2) // 3 - 1}"

    def build(self) -> DiT:
        """Build the network with newly initialised weights."""
        return DiT(self)


class DiT(nn.Module):
    """Patches -> transformer blocks -> patches. `forward(x, label, labels)` -> tensor of the shape of `x`."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.spec = spec
        width, pixels = spec.width, spec.channels * spec.patch**2
        self.patch_in = nn.Linear(pixels, width)
        self.position = nn.Parameter(torch.randn(1, (spec.size // spec.patch) ** 2, width) * 0.02)
        self.noise_embedding = NoiseEmbedding(width)
        self.class_embedding = nn.Embedding(spec.num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, spec.heads, spec.mlp_ratio) for _ in range(spec.depth))
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, pixels)
        for layer in (self.modulation_out, self.patch_out):
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
        tokens = self.patch_in(self._patches(x))
        tokens = tokens + self.position.to(tokens.dtype)  # keeps the stream in bf16 under autocast
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation_out(condition).unsqueeze(1).chunk(2, dim=-1)
        return self._image(self.patch_out(modulated_norm(tokens, shift, scale)))

    def _patches(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, tokens, C p p]."""
        b, c, h, w = x.shape
        p = self.spec.patch
        return x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)

    def _image(self, tokens: Tensor) -> Tensor:
        """[B, tokens, C p p] -> [B, C, H, W]."""
        s, p, c = self.spec.size // self.spec.patch, self.spec.patch, self.spec.channels
        return tokens.reshape(-1, s, s, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(-1, c, s * p, s * p)


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the condition (adaLN-zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, mlp_ratio * width)
        self.mlp_out = nn.Linear(mlp_ratio * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        for layer in (self.qkv, self.proj, self.mlp_in, self.mlp_out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """`tokens` [B, N, width], `condition` [B, width] -> [B, N, width]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        attended = self._attention(modulated_norm(tokens, shift_a, scale_a))
        tokens = torch.addcmul(tokens, gate_a, attended)
        hidden = F.silu(self.mlp_in(modulated_norm(tokens, shift_m, scale_m)))
        return torch.addcmul(tokens, gate_m, self.mlp_out(hidden))

    def _attention(self, tokens: Tensor) -> Tensor:
        b, n, width = tokens.shape
        q, k, v = self.qkv(tokens).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * (width // self.heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, width))


def modulated_norm(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then scale and shift from the condition (adaLN)."""
    return torch.addcmul(shift, F.layer_norm(tokens, tokens.shape[-1:]), 1 + scale)


class NoiseEmbedding(nn.Module):
    """Sinusoids of the noise label, then two linear layers. [B] -> [B, width]."""

    frequencies: Tensor

    def __init__(self, width: int, frequencies: int = 32) -> None:
        super().__init__()
        # c_noise spans about -1.6 .. 1.1: periods from far above that range down to 1/40 of it
        self.register_buffer(
            "frequencies", 250 * torch.exp(-math.log(1e4) * torch.arange(frequencies) / frequencies), persistent=False
        )
        self.hidden = nn.Linear(2 * frequencies, width)
        self.out = nn.Linear(width, width)

    def forward(self, label: Tensor) -> Tensor:
        angles = label.float()[:, None] * self.frequencies
        return self.out(F.silu(self.hidden(torch.cat([angles.cos(), angles.sin()], dim=1))))
