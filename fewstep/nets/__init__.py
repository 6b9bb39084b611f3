"""Backbones written here. The union below is the only list of them."""

from typing import Annotated

from pydantic import Field

from fewstep.nets.diffusers_net import FAMILIES, FLUX_GUIDANCE, DiffusersSpec, Family
from fewstep.nets.dit import DiT, DiTSpec
from fewstep.nets.edm_unet import DhariwalUNet, DhariwalUNetSpec, SongUNet, SongUNetSpec
from fewstep.nets.mlp import MLP, MLPSpec
from fewstep.nets.unet import UNet, UNetSpec

__all__ = [
    "FAMILIES",
    "FLUX_GUIDANCE",
    "MLP",
    "DhariwalUNet",
    "DhariwalUNetSpec",
    "DiT",
    "DiTSpec",
    "DiffusersSpec",
    "Family",
    "MLPSpec",
    "NetSpec",
    "SongUNet",
    "SongUNetSpec",
    "UNet",
    "UNetSpec",
]

NetSpec = Annotated[
    DiTSpec | UNetSpec | SongUNetSpec | DhariwalUNetSpec | MLPSpec | DiffusersSpec, Field(discriminator="kind")
]
