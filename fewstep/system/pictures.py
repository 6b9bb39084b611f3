"""Image tensors to PNG files."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fewstep.system.files import atomic_write

__all__ = ["grid", "save_grid"]


def grid(images: Tensor, columns: int, gap: int = 2, scale: int = 1) -> Image.Image:
    """Arrange uint8 images [N, C, H, W] (C = 1 or 3) in rows on white, enlarging each pixel by `scale`."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    sheet = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[:, top : top + h, left : left + w] = image
    array = sheet.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[..., 0] if c == 1 else array)
    return (
        picture
        if scale == 1
        else picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    )


def save_grid(images: Tensor, path: Path, columns: int, scale: int = 2, gap: int = 2) -> Path:
    """Write `grid` as a PNG, atomically; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    grid(images, columns, gap, scale).save(drawn, "PNG")
    atomic_write(path, drawn.getvalue(), sync=False)
    return path
