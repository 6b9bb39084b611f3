"""EDM's augmentation: geometric transformations of images, and the nine numbers that describe them to the network.

Karras et al. 2022 (arXiv 2206.00364), appendix F.2 and table 6, after Karras et al. 2020 (arXiv 2006.06676). A network
conditioned on these numbers learns clean images, which have zeros. Departure: one bicubic lookup with reflected borders
instead of the paper's wavelet filters.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["AUGMENT_DIM", "augment"]

AUGMENT_DIM = 9
SCALE_STD, TRANSLATE_STD = 0.2, 1 / 8  # in powers of two, and in widths of the image (table 6)
ANISO_ROTATE = 0.5  # chance of a stretch in a random direction (the paper's aniso_rotate_prob)


def augment(images: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Transform each image at random; differentiable in `images`.

    Mirroring has probability 1/2, a vertical flip `probability` / 2. Scale, rotation, stretch (along an axis or a
    random direction, equally often) and translation each have `probability`.

    Args:
        images: [B, C, H, H].
        probability: 0 .. 1 (0.12 for CIFAR-10, 0.15 for FFHQ and AFHQv2).

    Returns:
        Images of the same shape, and their conditioning [B, 9]: horizontal flip, vertical flip, log-scale, cosine - 1
        and sine of the rotation, stretch along two axes, translation along two axes.
    """
    count, device = len(images), images.device

    def chosen(value: Tensor, chance: float = probability) -> Tensor:
        """`value` [B, ...] of the samples that are transformed, 0 for the others."""
        return torch.where((torch.rand(count) < chance).view(-1, *[1] * (value.ndim - 1)), value, 0.0)

    mirror, over = chosen(torch.ones(count), 0.5), chosen(torch.ones(count), probability / 2)
    size = chosen(torch.randn(count))
    angle = chosen(math.pi * (2 * torch.rand(count) - 1))
    stretch, direction = chosen(torch.randn(count)), chosen(math.pi * (2 * torch.rand(count) - 1), ANISO_ROTATE)
    shift = chosen(torch.randn(count, 2))
    numbers = [mirror, over, size, angle.cos() - 1, angle.sin(), stretch * direction.cos(), stretch * direction.sin()]
    conditioning = torch.cat([torch.stack(numbers, 1), shift], 1).to(device)

    images = torch.where((mirror > 0).view(-1, 1, 1, 1).to(device), images.flip(-1), images)
    images = torch.where((over > 0).view(-1, 1, 1, 1).to(device), images.flip(-2), images)
    moved = (conditioning[:, 2:] != 0).any(1)
    if not moved.any():
        return images, conditioning
    # input position of each output pixel; coordinates run from -1 to 1 along each axis
    zoom = torch.exp2(-SCALE_STD * size)
    longer = torch.exp2(-SCALE_STD * stretch)
    back = (
        _diagonal(zoom, zoom)
        @ _rotation(angle)
        @ _rotation(-direction)
        @ _diagonal(longer, 1 / longer)
        @ _rotation(direction)
    )
    matrix = torch.cat([back, -back @ (2 * TRANSLATE_STD * shift)[..., None]], 2).to(images)[moved]
    grid = F.affine_grid(matrix, [len(matrix), *images.shape[1:]], align_corners=False)
    seen = F.grid_sample(images[moved], grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return images.index_put((moved.nonzero().squeeze(1),), seen), conditioning


def _rotation(angle: Tensor) -> Tensor:
    """Rotations by `angle` [B], [B, 2, 2]."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)


def _diagonal(first: Tensor, second: Tensor) -> Tensor:
    """Diagonal matrices [B, 2, 2] of two factors [B]."""
    return torch.diag_embed(torch.stack([first, second], 1))
