"""Resize and crop images before feature extraction, as in published protocols."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def centre(whole: int, part: int) -> int:
    """Start of a central crop, rounded like torchvision's `center_crop`: half pixels to even."""
    return round((whole - part) / 2)


def square(images: Tensor) -> Tensor:
    """Crop images [B, C, H, W] to their central square."""
    side = min(images.shape[2:])
    top, left = (centre(whole, side) for whole in images.shape[2:])
    return images[:, :, top : top + side, left : left + side]


def resized(images: Tensor, side: int, filter: Image.Resampling = Image.Resampling.LANCZOS) -> Tensor:
    """Resize square uint8 images [B, C, H, H] to `side` pixels with PIL's antialiased filters, channel by channel."""
    if images.shape[2:] == (side, side):
        return images
    planes = [
        np.asarray(Image.fromarray(plane.numpy()).resize((side, side), filter)) for plane in images.cpu().flatten(0, 1)
    ]
    return torch.from_numpy(np.stack(planes)).unflatten(0, images.shape[:2])


def clean_resized(images: Tensor, side: int) -> Tensor:
    """Resize uint8 [B, C, H, W] to float32 [B, C, side, side] in 0..255: bicubic in floating point, without rounding."""
    planes = [
        np.asarray(Image.fromarray(plane.numpy()).resize((side, side), Image.Resampling.BICUBIC))
        for plane in images.float().flatten(0, 1)
    ]
    return torch.from_numpy(np.stack(planes)).clamp(0, 255).unflatten(0, images.shape[:2])
