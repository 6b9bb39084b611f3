"""Distillation methods, one file per paper. `shipped` lists them; a method's module loads only the interface."""

from typing import TYPE_CHECKING

from fewstep.methods.base import Batch, Critic, Nets, Objective, Pairs, Terms

if TYPE_CHECKING:
    from fewstep.methods.shipped import (
        DMD,
        DMD2,
        DPDMD,
        GAN,
        SCM,
        TDM,
        Consistency,
        DecoupledDMD,
        FDistill,
        Regression,
        SiD,
        SiDA,
    )

__all__ = [
    "DMD", "DMD2", "DPDMD", "GAN", "SCM", "TDM", "Batch", "Consistency", "Critic", "DecoupledDMD", "FDistill", "Nets", "Objective",
    "Pairs", "Regression", "SiD", "SiDA", "Terms",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Load the shipped methods on first use, so that one method does not import the others."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fewstep.methods import shipped

    return getattr(shipped, name)
