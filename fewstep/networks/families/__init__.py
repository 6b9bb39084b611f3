"""Families of diffusers' networks: how each is called, encodes its prompts, and lays out its samples.

A family is one file here and one line of `FAMILIES`. Tokens and their places come from the
pipelines' own static methods where they have them. Signs, times and masks are fixed in the loop of a pipeline's call, and
a student is built without a pipeline: tests/teachers/test_families.py compares each with what that call passes on.
"""

from fewstep.networks.families import (
    chroma,
    ddpm,
    flux,
    flux2,
    krea2,
    longcat,
    lumina2,
    pixart,
    qwen_image,
    sana,
    sd3,
    unet,
    z_image,
)
from fewstep.networks.families.base import Condition, Family
from fewstep.networks.families.unet import framed_time_ids

__all__ = ["FAMILIES", "Condition", "Family", "framed_time_ids"]

FAMILIES: dict[str, Family] = {
    "UNet2DModel": ddpm.FAMILY,
    "UNet2DConditionModel": unet.FAMILY,
    "SD3Transformer2DModel": sd3.FAMILY,
    "FluxTransformer2DModel": flux.FAMILY,
    "SanaTransformer2DModel": sana.FAMILY,
    "PixArtTransformer2DModel": pixart.FAMILY,
    "Flux2Transformer2DModel": flux2.FAMILY,
    "ZImageTransformer2DModel": z_image.FAMILY,
    "QwenImageTransformer2DModel": qwen_image.FAMILY,
    "Lumina2Transformer2DModel": lumina2.FAMILY,
    "Krea2Transformer2DModel": krea2.FAMILY,
    "ChromaTransformer2DModel": chroma.FAMILY,
    "LongCatImageTransformer2DModel": longcat.FAMILY,
}
