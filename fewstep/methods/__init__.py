"""Distillation methods, one file a paper. `shipped` lists them; a method's own module loads the interface alone."""

from typing import TYPE_CHECKING

from fewstep.methods.base import Batch, Critic, Nets, Objective, Pairs, Terms

if TYPE_CHECKING:
    from fewstep.methods.shipped import DMD, DMD2, Regression, SiD

__all__ = ["DMD", "DMD2", "Batch", "Critic", "Nets", "Objective", "Pairs", "Regression", "SiD", "Terms"]


def __getattr__(name: str) -> object:
    """Load the shipped methods when one of them is asked for, so that one method does not import the others."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fewstep.methods import shipped

    return getattr(shipped, name)
