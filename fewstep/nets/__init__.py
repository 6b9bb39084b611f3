"""Backbones written here. The union below is the only list of them."""

from typing import Annotated, Union

from pydantic import Field

from fewstep.nets.dit import DiT, DiTSpec
from fewstep.nets.mlp import MLP, MLPSpec

__all__ = ["DiT", "DiTSpec", "MLP", "MLPSpec", "NetSpec"]

NetSpec = Annotated[Union[DiTSpec, MLPSpec], Field(discriminator="kind")]
