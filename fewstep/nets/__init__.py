"""Backbones written here. The union below is the only list of them."""

from typing import Annotated

from pydantic import Field

from fewstep.nets.dit import DiT, DiTSpec
from fewstep.nets.mlp import MLP, MLPSpec
from fewstep.nets.unet import UNet, UNetSpec

__all__ = ["MLP", "DiT", "DiTSpec", "MLPSpec", "NetSpec", "UNet", "UNetSpec"]

NetSpec = Annotated[DiTSpec | UNetSpec | MLPSpec, Field(discriminator="kind")]
