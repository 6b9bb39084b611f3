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

__all__ = ["refuse_other_layout", "tiny_decoder", "vae_codec", "vae_outline"]


def vae_codec(pipeline: Any, whose: str, latents: Latents, size: tuple[int, int]) -> Codec | None:
    """Make a codec of the VAE in float32 (SDXL's overflows in float16) for samples of this size; None for pixel pipelines."""
    vae = pipeline.components.get("vae")
    if vae is None:
        return None
    vae = vae.float().requires_grad_(False).eval()
    if (bad := first_not_finite(vae.state_dict())) is not None:
        raise TeacherError(
            f"the VAE of {whose} must hold finite weights, got NaN or infinite numbers in {bad}. Try: get it again"
        )
    scaling, factor = LatentScaling.of(pipeline, whose, latents), latent_factor(pipeline)
    folds = hasattr(vae, "bn")  # FLUX.2
    video = "temperal_downsample" in vae.config  # Qwen-Image's is a video's, for one picture

    def decode(samples: Tensor) -> Tensor:
        vae.to(samples.device)
        with torch.autocast(samples.device.type, enabled=False):
            raw = scaling.raw(samples.float())
            raw = pipeline._unpatchify_latents(raw) if folds else raw
            picture = vae.decode(raw[:, :, None] if video else raw, return_dict=False)[0]
            return picture[:, :, 0] if video else picture

    def encode(pictures: Tensor) -> Tensor:
        """Encode as the posterior's mean, if the VAE has a posterior, so that latents are deterministic."""
        vae.to(pictures.device)
        with torch.autocast(pictures.device.type, enabled=False):
            pictures = pictures.float()
            found = vae.encode(pictures[:, :, None] if video else pictures, return_dict=False)[0]
            raw = found if isinstance(found, Tensor) else found.mode()
            raw = raw[:, :, 0] if video else raw
            return scaling.scaled(pipeline._patchify_latents(raw) if folds else raw)

    channels = vae.config.input_channels if video else vae.config.get("out_channels") or vae.config.in_channels
    digest = hashlib.sha256(f"{network_sha256(vae)} {scaling}".encode()).hexdigest()
    return Codec(decode, encode, (channels, factor * size[0], factor * size[1]), digest)


def tiny_decoder(place: str) -> tuple[Callable[[Tensor], Tensor], str]:
    """Load the small decoder, with the sha256 of its weights."""
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


def refuse_other_layout(config: Mapping[str, Any], whose: str) -> None:
    """Refuse what is done with a VAE's latents as they are where the network works on others: folded, or a video's.

    Raises:
        TeacherError: of FLUX.2 or Qwen-Image.
    """
    if "batch_norm_eps" in config or "temperal_downsample" in config:
        raise TeacherError(
            f"teacher.tiny_vae, and plan of methods that compare pairs, must be for a VAE whose latents the network works on, got "
            f"{whose} with a {config['_class_name']}. Try: without tiny_vae; `fewstep bench`, which runs an update"
        )


def vae_outline(tiny: str | None, config: Mapping[str, Any] | None, whose: str) -> nn.Module | None:
    """The autoencoder whose `decode` makes pictures for perceptual distances, without storage; None if samples are pixels.

    Raises:
        TeacherError: as `outline`.
    """
    diffusers = library()
    refuse_other_layout(config or {}, whose)
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
