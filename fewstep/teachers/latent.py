"""EDM2's teachers of latents: a network in a file, and Stable Diffusion's VAE beside it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fewstep.data.edm2_latents import MEAN, STD, from_raw, to_raw
from fewstep.system.console import quiet
from fewstep.system.errors import TeacherError
from fewstep.system.weights import first_not_finite
from fewstep.teachers.base import Codec, Teacher
from fewstep.teachers.loading import find_place
from fewstep.teachers.native import NativeTeacher
from fewstep.teachers.pipelines import library, network_sha256

__all__ = ["LatentTeacher"]


class LatentTeacher(NativeTeacher):
    """EDM2's network of the latents of ImageNet-512 (Karras et al. 2024, arXiv 2312.02696), with the VAE that decodes them.

    The VAE's latents are normalised by the published means and deviations to deviation 0.5 (`fewstep.data.edm2_latents`).
    """

    students_stand_alone: ClassVar[bool] = False
    latents: ClassVar[bool] = True

    kind: Literal["edm2-latents"] = "edm2-latents"  # type: ignore[assignment]
    path: str
    """A published EDM2 .pkl file, or a .safetensors file of such a network."""
    vae: str = "stabilityai/sd-vae-ft-mse"
    """Stable Diffusion's VAE: a folder of diffusers' AutoencoderKL, or its name on the hub."""

    def load(self) -> Teacher:
        """Read the network and the VAE.

        Raises:
            TeacherError: there is no such network or VAE, or they do not fit.
            FileError: a file is damaged.
        """
        teacher = super().load()
        find_place(self.vae, "teacher.vae")
        try:
            with quiet():
                vae = library().AutoencoderKL.from_pretrained(self.vae).float().requires_grad_(False).eval()
        except (OSError, ValueError) as error:
            raise TeacherError(f"teacher.vae {self.vae} cannot be loaded: {str(error).splitlines()[0]}") from None
        if teacher.shape[0] != len(MEAN) or vae.config.latent_channels != len(MEAN):
            raise TeacherError(
                f"teacher.path and teacher.vae must have {len(MEAN)} channels of latents, got {teacher.shape[0]} and "
                f"{vae.config.latent_channels}. Try: kind native for models of pixels"
            )
        if (bad := first_not_finite(vae.state_dict())) is not None:
            raise TeacherError(f"the VAE {self.vae} must hold finite weights, got NaN or infinite numbers in {bad}")

        def decode(samples: Tensor) -> Tensor:
            vae.to(samples.device)
            with torch.autocast(samples.device.type, enabled=False):
                return vae.decode(to_raw(samples.float()), return_dict=False)[0]

        def encode(pictures: Tensor) -> Tensor:
            """Encode as the posterior's mean, so that latents are deterministic."""
            vae.to(pictures.device)
            with torch.autocast(pictures.device.type, enabled=False):
                return from_raw(vae.encode(pictures.float(), return_dict=False)[0].mode())

        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        _, height, width = teacher.shape
        digest = hashlib.sha256(f"{network_sha256(vae)} {MEAN} {STD}".encode()).hexdigest()
        codec = Codec(decode, encode, (vae.config.out_channels, factor * height, factor * width), digest)
        return replace(teacher, codec=codec)
