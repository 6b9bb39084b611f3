"""The methods that fewstep ships. A method belongs to the choices of `objective.method` once it is imported here."""

from fewstep.methods.consistency import Consistency
from fewstep.methods.decoupled import DecoupledDMD
from fewstep.methods.dmd import DMD
from fewstep.methods.dmd2 import DMD2
from fewstep.methods.dp_dmd import DPDMD
from fewstep.methods.f_distill import FDistill
from fewstep.methods.gan_only import GAN
from fewstep.methods.regression import Regression
from fewstep.methods.scm import SCM
from fewstep.methods.sid import SiD
from fewstep.methods.sida import SiDA
from fewstep.methods.tdm import TDM

__all__ = [
    "DMD", "DMD2", "DPDMD", "GAN", "SCM", "TDM", "Consistency", "DecoupledDMD", "FDistill", "Regression", "SiD", "SiDA",
]  # fmt: skip
