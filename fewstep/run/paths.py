"""Path settings of a run: stored as absolute paths, and changeable if their content has moved.

Every checkpoint holds a fingerprint of the content (`Task.inputs`). Knows no setting's meaning.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

__all__ = ["PLACES", "absent", "anchored", "placed", "value_of"]

_TEACHER = ("path", "prompts", "lora", "tiny_vae", "config")
PLACES = (
    *(f"{owner}.{name}" for owner in ("teacher", "pipeline") for name in _TEACHER),
    "data.path",
    "data.root",
    "pairs",
    "start_from",
    "evaluation.reference",
    "evaluation.clip",
)
R = TypeVar("R", bound=BaseModel)


def value_of(run: BaseModel, name: str) -> Any:
    """Value of a setting by its dotted name; None if there is no such setting."""
    value: Any = run
    for part in name.split("."):
        value = dict(value).get(part) if isinstance(value, BaseModel) else None
    return value


def placed(run: R, name: str, value: Any) -> R:
    """Copy of the run with another value of a setting."""
    first, _, rest = name.partition(".")
    inner = placed(dict(run)[first], rest, value) if rest else value
    return run.model_copy(update={first: inner})


def anchored(run: R) -> R:
    """Copy of the run with absolute paths. Names of shipped teachers and of models on the hub are kept."""
    for name in PLACES:
        value = value_of(run, name)
        if value is not None and (path := Path(value).expanduser()).exists():
            run = placed(run, name, type(value)(os.path.abspath(path)))
    return run


def absent(run: BaseModel) -> list[str]:
    """Names of the settings whose paths do not exist."""
    values = {name: value_of(run, name) for name in PLACES}
    return [
        name
        for name, value in values.items()
        if value is not None and os.path.isabs(value) and not os.path.exists(value)
    ]
