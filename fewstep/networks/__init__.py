"""Networks. Importing a record here adds it to the choices of `net.kind`."""

from fewstep.networks.base import NetSpec, Normalised
from fewstep.networks.blocks import Blocked
from fewstep.networks.diffusers_net import DiffusersSpec
from fewstep.networks.dit import DiT, DiTSpec
from fewstep.networks.edm import DhariwalUNet, DhariwalUNetSpec, SongUNet, SongUNetSpec
from fewstep.networks.edm2 import EDM2Spec, EDM2UNet
from fewstep.networks.families import FAMILIES, Family
from fewstep.networks.mlp import MLP, MLPSpec
from fewstep.networks.unet import UNet, UNetSpec

__all__ = [
    "FAMILIES",
    "MLP",
    "Blocked",
    "DhariwalUNet",
    "DhariwalUNetSpec",
    "DiT",
    "DiTSpec",
    "DiffusersSpec",
    "EDM2Spec",
    "EDM2UNet",
    "Family",
    "MLPSpec",
    "NetSpec",
    "Normalised",
    "SongUNet",
    "SongUNetSpec",
    "UNet",
    "UNetSpec",
]
