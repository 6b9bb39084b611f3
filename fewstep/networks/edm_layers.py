"""Layers of EDM's U-Nets (`fewstep.networks.edm`): resampling convolutions, residual blocks, noise embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Block", "Conv", "Fourier", "group_norm", "sinusoids"]


class Conv(nn.Module):
    """Resampling with a fixed filter, a convolution, or both: the filter first, unless `filter_last`.

    Args:
        inputs: channels.
        outputs: channels; equal to `inputs` if there is no kernel.
        kernel: 3, 1, or 0 for the filter alone.
        resample: "up" doubles, "down" halves the side.
        taps: the filter, applied along both axes and normalised to sum 1.
        filter_last: convolve at full resolution and filter afterwards (NCSN++'s residual path).
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        resample: Literal["up", "down"] | None = None,
        taps: Sequence[int] = (1, 1),
        filter_last: bool = False,
    ) -> None:
        super().__init__()
        self.resample, self.filter_last = resample, filter_last
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(outputs)) if kernel else None
        row = torch.tensor(taps, dtype=torch.float32)
        plane = torch.outer(row, row) / row.sum() ** 2
        self.register_buffer("resample_filter", plane[None, None] if resample else None)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H', W']."""
        if self.weight is None:
            return self._resampled(x)
        padding = self.weight.shape[-1] // 2
        if self.filter_last and self.resample_filter is not None:
            wide = padding + (self.resample_filter.shape[-1] - 1) // 2
            return self._resampled(F.conv2d(x, self.weight, self.bias, padding=wide), padding=0)
        return F.conv2d(self._resampled(x), self.weight, self.bias, padding=padding)

    def _resampled(self, x: Tensor, padding: int | None = None) -> Tensor:
        if self.resample_filter is None:
            return x
        channels, taps = x.shape[1], self.resample_filter.to(x.dtype)
        padding = (taps.shape[-1] - 1) // 2 if padding is None else padding
        each = taps.expand(channels, 1, *taps.shape[2:])
        if self.resample == "up":  # one pixel becomes four: the filter's sum with it
            return F.conv_transpose2d(x, 4 * each, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, each, stride=2, padding=padding, groups=channels)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group norm with 32 groups, or fewer so that each has four channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class Block(nn.Module):
    """Norm, SiLU, convolution, condition, norm, SiLU, dropout, convolution, around a residual; then attention.

    Args:
        inputs: channels in.
        outputs: channels out.
        embedding: channels of the condition.
        heads: attention heads; 0 for no attention.
        resample: whether to halve or double the side.
        taps: filter that resamples.
        scaled: the condition scales and shifts the second norm's output (ADM); otherwise it is added before the norm (Song).
        project: the skip has a convolution even if only the side changes (Song).
        gain: factor on each sum with a residual: √½ keeps the variance (Song), 1 (ADM).
        eps: of the norms.
        dropout: probability.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        heads: int,
        resample: Literal["up", "down"] | None,
        taps: Sequence[int],
        scaled: bool,
        project: bool,
        gain: float,
        eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.heads, self.scaled, self.gain, self.dropout = heads, scaled, gain, dropout
        self.norm0 = group_norm(inputs, eps)
        self.conv0 = Conv(inputs, outputs, 3, resample, taps)
        self.affine = nn.Linear(embedding, outputs * (2 if scaled else 1))
        self.norm1 = group_norm(outputs, eps)
        self.conv1 = Conv(outputs, outputs, 3)
        self.skip: Conv | None = None
        if inputs != outputs or resample:
            self.skip = Conv(inputs, outputs, 1 if project or inputs != outputs else 0, resample, taps)
        if heads:
            self.norm2 = group_norm(outputs, eps)
            self.qkv = Conv(outputs, 3 * outputs, 1)
            self.proj = Conv(outputs, outputs, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`x` [B, inputs, H, W], `embedding` [B, embedding] -> [B, outputs, H', W']."""
        h = self.conv0(F.silu(self.norm0(x)))
        condition = self.affine(embedding)[..., None, None].to(h.dtype)
        if self.scaled:
            scale, shift = condition.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(h + condition)
        h = self.conv1(F.dropout(F.silu(h), self.dropout, self.training))
        h = (h + (x if self.skip is None else self.skip(x))) * self.gain
        return (h + self._attended(h)) * self.gain if self.heads else h

    def _attended(self, h: Tensor) -> Tensor:
        b, c, height, width = h.shape
        # the published layout: channels are (head, channel, query | key | value)
        qkv = self.qkv(self.norm2(h)).reshape(b, self.heads, c // self.heads, 3, height * width)
        q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(3))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(-1, -2).reshape(b, c, height, width))


def sinusoids(label: Tensor, channels: int, endpoint: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `label` [B] at frequencies 1 .. 1/10000, [B, channels / 2] each."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=label.device) / (half - (1 if endpoint else 0))
    angles = label.float()[:, None] * (1 / 10_000) ** steps
    return angles.cos(), angles.sin()


class Fourier(nn.Module):
    """Cosines and sines at random frequencies (Tancik et al. 2020), kept in the file. [B] -> two of [B, channels / 2]."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, label: Tensor) -> tuple[Tensor, Tensor]:
        angles = label.float()[:, None] * (2 * math.pi * self.freqs.float())
        return angles.cos(), angles.sin()
