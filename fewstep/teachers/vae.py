"""Pictures and latents: a pipeline's VAE, or a tiny decoder, as a codec in float32."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.system.console import quiet
from fewstep.system.errors import TeacherError
from fewstep.system.weights import first_not_finite
from fewstep.teachers.base import Codec
from fewstep.teachers.facts import Latents, LatentScaling
from fewstep.teachers.loading import find_place
from fewstep.teachers.pipelines import TINY, latent_factor, library, network_sha256

__all__ = ["tiny_decoder", "vae_codec", "vae_outline"]


def vae_codec(pipeline: Any, whose: str, latents: Latents, size: tuple[int, int]) -> Codec | None:
    """The VAE in float32 (SDXL's overflows in float16) for samples of so many rows and columns; None if the pipeline works on pixels."""
    vae = pipeline.components.get("vae")
    if vae is None:
        return None
    vae = vae.float().requires_grad_(False).eval()
    if (bad := first_not_finite(vae.state_dict())) is not None:
        raise TeacherError(
            f"the VAE of {whose} must hold finite weights, got NaN or infinite numbers in {bad}: get it again"
        )
    scaling, factor = LatentScaling.of(pipeline, whose, latents), latent_factor(pipeline)

    def decode(samples: Tensor) -> Tensor:
        vae.to(samples.device)
        with torch.autocast(samples.device.type, enabled=False):
            return vae.decode(scaling.raw(samples.float()), return_dict=False)[0]

    def encode(pictures: Tensor) -> Tensor:
        """The mean of the posterior where there is one: the same latent each time."""
        vae.to(pictures.device)
        with torch.autocast(pictures.device.type, enabled=False):
            found = vae.encode(pictures.float(), return_dict=False)[0]
            return scaling.scaled(found if isinstance(found, Tensor) else found.mode())

    channels = vae.config.get("out_channels") or vae.config.in_channels
    digest = hashlib.sha256(f"{network_sha256(vae)} {scaling}".encode()).hexdigest()
    return Codec(decode, encode, (channels, factor * size[0], factor * size[1]), digest)


def tiny_decoder(place: str) -> tuple[Callable[[Tensor], Tensor], str]:
    """The small decoder, and the sha256 of its weights."""
    find_place(place, "teacher.tiny_vae")
    try:
        with quiet():
            tiny = library().AutoencoderTiny.from_pretrained(place).float().requires_grad_(False).eval()
    except (OSError, ValueError) as error:
        raise TeacherError(f"teacher.tiny_vae {place} cannot be loaded: {str(error).splitlines()[0]}") from None

    def decode(samples: Tensor) -> Tensor:
        tiny.to(samples.device)
        with torch.autocast(samples.device.type, enabled=False):
            return tiny.decode(samples.float() / tiny.config.scaling_factor, return_dict=False)[0]

    return decode, network_sha256(tiny)


def vae_outline(tiny: str | None, config: Mapping[str, Any] | None) -> nn.Module | None:
    """The autoencoder whose `decode` makes pictures for perceptual distances, without storage; None if samples are pixels.

    Raises:
        TeacherError: as `outline`.
    """
    diffusers = library()
    if tiny is not None:
        cls: Any = diffusers.AutoencoderTiny
        if tiny not in TINY:
            find_place(tiny, "teacher.tiny_vae")
        try:
            with quiet():
                config = {} if tiny in TINY else cls.load_config(tiny)
        except (OSError, ValueError) as error:
            raise TeacherError(
                f"the configuration of teacher.tiny_vae {tiny} cannot be had: {str(error).splitlines()[0]}"
            ) from None
    else:
        if config is None:
            return None
        cls = getattr(diffusers, config["_class_name"])
    with torch.device("meta"), quiet():
        autoencoder: nn.Module = cls.from_config(config)
    return autoencoder.requires_grad_(False).eval()
