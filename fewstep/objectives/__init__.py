"""Distillation methods, one file a paper. The union below is the only list of them."""

from typing import Annotated

from pydantic import Field

from fewstep.objectives.base import Batch, Critic, Nets, Objective, Pairs, Terms
from fewstep.objectives.dmd import DMD
from fewstep.objectives.dmd2 import DMD2
from fewstep.objectives.regression import Regression
from fewstep.objectives.sid import SiD

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
