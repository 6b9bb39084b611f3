"""The provenance of a run's files: version, settings, hardware, date."""

from __future__ import annotations

from datetime import date
from typing import Any

import torch
from pydantic import BaseModel

import fewstep
from fewstep.system import distributed
from fewstep.system.device import hardware

__all__ = ["provenance_of"]


def provenance_of(run: BaseModel) -> dict[str, Any]:
    """Provenance of a file, for its JSON."""
    return {
        "made_by": f"fewstep {fewstep.__version__}",
        "run": run.model_dump(mode="json", exclude_none=True),
        "hardware": hardware(distributed.world_size()),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
