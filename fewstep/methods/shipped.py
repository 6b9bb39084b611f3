"""The methods that fewstep ships. The union below is the only list of them."""

from typing import Annotated

from pydantic import Field

from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.regression import Regression
from fewstep.methods.sid import SiD

__all__ = ["DMD", "DMD2", "ObjectiveSpec", "Regression", "SiD"]

ObjectiveSpec = Annotated[DMD | DMD2 | SiD | Regression, Field(discriminator="method")]
