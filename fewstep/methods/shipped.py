"""The methods that fewstep ships. Importing a method here adds it to the choices of `objective.method`."""

from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.regression import Regression
from fewstep.methods.sid import SiD

__all__ = ["DMD", "DMD2", "Regression", "SiD"]
