"""Picture sizes: a model's or setting's own, and buckets of several shapes with about as many pixels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from fewstep.system.errors import TeacherError

__all__ = ["Buckets", "Resolution", "bucket_sizes", "sample_size"]

Pixels = Annotated[int, Field(gt=0)]
Resolution = Pixels | tuple[Pixels, Pixels]
"""Size of a picture in pixels: of both sides, or width and height."""
Buckets = Literal["auto"] | tuple[tuple[Pixels, Pixels], ...]
"""Width and height of each bucket, or a rule."""
COARSE = 64  # pixels between the widths of automatic buckets of large pictures, as trainers have them


def sample_size(
    config: Mapping[str, Any], factor: int, resolution: Resolution | None, whose: str, setting: str = "resolution"
) -> tuple[int, int]:
    """Height and width of a sample in latents, from the network's configuration and the VAE's downsampling factor.

    Raises:
        TeacherError: `resolution` (pixels) is not a multiple of the network's step, or exceeds its position table.
    """
    if resolution is None:
        side = config["sample_size"]
        height, width = (side, side) if isinstance(side, int) else side  # in diffusers the height comes first
    else:
        across, down = (resolution, resolution) if isinstance(resolution, int) else resolution
        step = _step(config, factor)
        if across % step or down % step:
            near = [max(step, round(pixels / step) * step) for pixels in (across, down)]
            raise TeacherError(
                f"teacher.{setting} must be multiples of {step} pixels, as {whose} needs, got {_shown(resolution)}. Try: "
                f"{_shown(near[0] if isinstance(resolution, int) else (near[0], near[1]))}"
            )
        height, width = down // factor, across // factor
    places = config.get("pos_embed_max_size")  # of SD3, which has a table of places
    if places is not None and max(height, width) > places * config["patch_size"]:
        most = places * config["patch_size"] * factor
        raise TeacherError(
            f"teacher.{setting} must be at most {most} pixels a side, as {whose} has no places for more, got "
            f"{_shown((width * factor, height * factor))}"
        )
    return height, width


def bucket_sizes(
    config: Mapping[str, Any], factor: int, size: tuple[int, int], buckets: Buckets, whose: str
) -> tuple[tuple[int, int], ...]:
    """Height and width of each bucket in latents, without duplicates.

    `auto` has every width and the largest height to it with at most as many pixels as `size`, from 1:2 to 2:1, in steps of
    64 pixels or of what the network needs; for SDXL 704 x 1408 to 1408 x 704.

    Args:
        config: the network's configuration.
        factor: pixels per latent, along a side.
        size: height and width of the model's own pictures in latents; one of the buckets.
        buckets: the setting.
        whose: the model's name, for messages.

    Raises:
        TeacherError: a bucket that `sample_size` refuses, or none has the model's own size.
    """
    if buckets != "auto":
        found = [sample_size(config, factor, bucket, whose, "buckets") for bucket in buckets]
        if size not in found:
            own = _shown((size[1] * factor, size[0] * factor))
            raise TeacherError(
                f"teacher.buckets must hold the size that is scored and drawn, {own}, got {', '.join(map(_shown, buckets))}. Try: "
                "add it, or set teacher.resolution to one of them"
            )
        return tuple(dict.fromkeys(found))
    step = _step(config, factor)
    area = size[0] * size[1] * factor**2
    if area >= 512**2:
        step = math.lcm(step, COARSE)
    found = [size]
    for across in range(step, 2 * math.isqrt(area), step):
        down = area // across // step * step
        if down and max(across, down) <= 2 * min(across, down):
            found += [(down // factor, across // factor), (across // factor, down // factor)]
    places = config.get("pos_embed_max_size")
    most = math.inf if places is None else places * config["patch_size"]
    return tuple(sorted({found for found in found if max(found) <= most}))


def _step(config: Mapping[str, Any], factor: int) -> int:
    """Return the number of pixels that must divide both sides, given by the network's halvings and patches."""
    return factor * (
        2 ** (len(config["block_out_channels"]) - 1) if "block_out_channels" in config else config.get("patch", 2)
    )


def _shown(resolution: Resolution) -> str:
    return str(resolution) if isinstance(resolution, int) else f"[{resolution[0]}, {resolution[1]}]"
