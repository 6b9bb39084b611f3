"""Distillation methods, one file a paper. The union below is the only list of them."""

from typing import Annotated

from pydantic import Field

from fewstep.methods.base import Batch, Critic, Nets, Objective, Pairs, Terms
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.regression import Regression
from fewstep.methods.sid import SiD

__all__ = [
    "DMD",
    "DMD2",
    "Batch",
    "Critic",
    "Nets",
    "Objective",
    "ObjectiveSpec",
    "Pairs",
    "Regression",
    "SiD",
    "Terms",
]

ObjectiveSpec = Annotated[DMD | DMD2 | SiD | Regression, Field(discriminator="method")]
