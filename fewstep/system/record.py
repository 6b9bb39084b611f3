"""Base class of all settings and headers: typed, frozen, without unknown entries."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen pydantic record; unknown entries, inf and nan are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
