"""The library that people import: load, sample, distill, pretrain, evaluate. `fewstep` has these names, loaded lazily."""

from fewstep.evaluation.scores import Scores
from fewstep.library.model import Model, load, sample
from fewstep.library.pictures import Pictures
from fewstep.library.runs import distill, pretrain
from fewstep.library.scoring import evaluate
from fewstep.system.errors import UserError

__all__ = ["Model", "Pictures", "Scores", "UserError", "distill", "evaluate", "load", "pretrain", "sample"]
