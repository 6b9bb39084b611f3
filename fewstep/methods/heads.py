"""Discriminator heads: networks that turn a layer of the fake score into logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Denoiser, tap

if TYPE_CHECKING:
    from fewstep.teachers.base import Conditioner

__all__ = ["ConvHead", "MeanHead", "TokenHead", "make_head"]


def make_head(denoiser: Denoiser, layer: str, shape: tuple[int, ...], conditioner: Conditioner) -> nn.Module:
    """Make a head for the output of `layer`; one forward on zeros determines its kind and size.

    Args:
        denoiser: the fake score.
        layer: name of the submodule to read.
        shape: shape of one sample.
        conditioner: makes a condition for that forward.

    Raises:
        ValueError: no such layer, or an output that is not a feature map, token list or vector.
    """
    device = next(denoiser.parameters()).device
    cond = {name: value.to(device) for name, value in conditioner.cond(None, 1).items()}
    with torch.no_grad(), tap(denoiser, layer) as features:
        denoiser(torch.zeros(1, *shape, device=device), torch.ones(1, device=device), **cond)
    feature = features[0]
    match feature.ndim:
        case 4:
            return ConvHead(feature.shape[1], min(feature.shape[2:])).to(device)
        case 2 | 3:
            return TokenHead(feature.shape[-1]).to(device)
    raise ValueError(
        f"the bottleneck {layer!r} must give features [B, C, H, W], [B, N, C] or [B, C] to a GAN head, got "
        f"{list(feature.shape)}. Try: name another layer as the teacher's bottleneck"
    )


class ConvHead(nn.Sequential):
    """DMD2's head on a feature map: 4x4 stride-2 convolutions down to 4x4, one over the rest, then 1x1 to a logit.

    Yin et al. 2024 (arXiv 2405.14867), appendix; for EDM's 8x8 bottleneck it is the authors' head. With 32 or 8 channels, the
    last normalisation gets larger groups, because it sees one pixel.

    `side` is the map's shorter one. The last convolution reads a longer map from end to end, and the logit is the mean.
    """

    def __init__(self, channels: int, side: int) -> None:
        layers: list[nn.Module] = []
        groups = 32 if channels % 32 == 0 else 8 if channels % 8 == 0 else 1
        while side > 4:
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), nn.GroupNorm(groups, channels), nn.SiLU()]
            side //= 2
        last = groups if channels > groups else max(1, groups // 8)  # a group of one value is normalised to zero
        layers += [nn.Conv2d(channels, channels, side), nn.GroupNorm(last, channels), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, feature: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B]."""
        return super().forward(feature).flatten(1).mean(1)


class MeanHead(nn.Module):
    """SiDA's head, without parameters: the mean over channels is a logit for each place (Zhou et al. 2024, arXiv 2410.14919)."""

    def forward(self, feature: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, H, W]; tokens [B, N, C] -> [B, N]; a vector [B, C] -> [B]."""
        return feature.mean(1) if feature.ndim == 4 else feature.mean(-1)


class TokenHead(nn.Module):
    """A head on transformer tokens or on a vector: two layers per token, mean over tokens, one logit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.mix = nn.Linear(width, width)
        self.logit = nn.Linear(width, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """[B, N, C] or [B, C] -> logits [B]."""
        hidden = F.silu(self.hidden(self.norm(feature)))
        pooled = hidden.mean(1) if hidden.ndim == 3 else hidden
        return self.logit(F.silu(self.mix(pooled))).sum(1)  # sum of one value instead of a view, which FSDP warns about
