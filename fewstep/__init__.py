"""fewstep: distil a pretrained diffusion model into a generator of one to four network calls.

`load`, `sample`, `distill`, `pretrain` and `evaluate` are the library; `import fewstep` alone loads neither them nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.library import Model, Pictures, Scores, UserError, distill, evaluate, load, pretrain, sample

__version__ = "0.1.0"

__all__ = ["Model", "Pictures", "Scores", "UserError", "distill", "evaluate", "load", "pretrain", "sample"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(importlib.import_module("fewstep.library"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
