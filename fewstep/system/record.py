"""The base of all settings and headers: typed, frozen, and without unknown entries."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """A frozen pydantic record; an entry that it does not have is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
