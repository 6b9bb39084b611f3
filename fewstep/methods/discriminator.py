"""GAN heads: small networks on a layer of the fake score. Their sizes are probed from the network, never hard-coded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Denoiser, tap
from fewstep.teachers.base import Conditioner

__all__ = ["ConvHead", "TokenHead", "make_head"]


def make_head(denoiser: Denoiser, layer: str, shape: tuple[int, ...], conditioner: Conditioner) -> nn.Module:
    """A head for the output of `layer`, its kind and size found by one forward on zeros.

    Args:
        denoiser: the fake score.
        layer: name of the submodule to read.
        shape: of one sample.
        conditioner: makes a condition to probe with.

    Raises:
        ValueError: no such layer, or an output that is no feature map, token list or vector.
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
        f"layer {layer!r} gives a feature of shape {list(feature.shape)}: a GAN head reads [B, C, H, W], [B, N, "
        "C] or [B, C]"
    )


class ConvHead(nn.Sequential):
    """DMD2's head on a feature map: 4x4 stride-2 convolutions down to 4x4, one over what is left, then 1x1 to a logit.

    Yin et al. 2024 (arXiv 2405.14867), appendix; for EDM's 8x8 bottleneck it is the authors' head. Networks with 32 channels
    or 8 there get larger groups in the last normalisation, which sees one pixel.
    """

    def __init__(self, channels: int, side: int) -> None:
        layers: list[nn.Module] = []
        groups = 32 if channels % 32 == 0 else 8 if channels % 8 == 0 else 1
        while side > 4:
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), nn.GroupNorm(groups, channels), nn.SiLU()]
            side //= 2
        last = groups if channels > groups else max(1, groups // 8)  # one number a group would be normalised to nothing
        layers += [nn.Conv2d(channels, channels, side, stride=side), nn.GroupNorm(last, channels), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, feature: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B]."""
        return super().forward(feature).flatten(1).mean(1)


class TokenHead(nn.Module):
    """A head on transformer tokens or on a vector: two layers a token, mean over tokens, one logit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.mix = nn.Linear(width, width)
        self.logit = nn.Linear(width, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """[B, N, C] or [B, C] -> logits [B]."""
        hidden = nn.functional.silu(self.hidden(self.norm(feature)))
        pooled = hidden.mean(1) if hidden.ndim == 3 else hidden
        return self.logit(nn.functional.silu(self.mix(pooled))).sum(1)  # of one number: no view, which FSDP warns of
