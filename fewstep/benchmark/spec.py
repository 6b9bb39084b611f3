"""The file of a benchmark: one teacher, one reference that nothing was trained on, and the methods that are compared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator

from fewstep.evaluation.metrics import Metric
from fewstep.library.runs import changed, teacher_settings
from fewstep.run.settings import explain, load_run, read_settings
from fewstep.run.specs import DistillRun
from fewstep.system.errors import SettingsError
from fewstep.system.record import Record

__all__ = ["Benchmark", "Entry", "read_benchmark"]

Count = Annotated[int, Field(gt=0)]


class Entry(Record):
    """One method of the comparison."""

    recipe: str
    """A run file, or a shipped recipe."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """What differs from the recipe and from `shared`: nested, or by path (`train.images`)."""


class Benchmark(Record):
    """Students of one teacher, each with several seeds, beside the teacher under its best samplers."""

    kind: Literal["benchmark"]
    title: str
    """Heading of the page."""
    teacher: str
    """A run folder, a file or a shipped teacher."""
    calls: tuple[Count, ...] = Field((35, 18, 9, 5, 4, 2, 1), min_length=1)
    """Numbers of network calls of the teacher, each with the sampler that `fewstep tune-sampler` finds."""
    tuned_on: Count = 2_000
    """Samples by which a sampler is chosen, against a part of the teacher's training images."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    """Seeds of every student's training."""
    samples: Count = 10_000
    """Samples of every score."""
    reference: str
    """Real images of every score, on which nothing was trained or chosen."""
    extractors: tuple[Literal["inception", "small", "pixels"], ...] = Field(("inception",), min_length=1)
    """Feature networks; the first one orders the table."""
    metrics: tuple[Metric, ...] = ("fid", "kid", "precision", "recall", "density", "coverage")
    """Metrics in the first extractor's features; of the others FID alone."""
    shared: dict[str, Any] = Field(default_factory=dict)
    """Settings of all students, before their own."""
    students: dict[str, Entry] = Field(min_length=1)
    """Methods by name."""
    notes: tuple[str, ...] = ()
    """What a reader of the page must know: where the settings come from, what was chosen by what."""

    @field_validator("seeds", "calls", "extractors")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"must name each value once, got {', '.join(map(str, values))}")
        return values

    @field_validator("metrics")
    @classmethod
    def _with_fid(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if "fid" not in values:
            raise ValueError("must hold fid, which orders the table")
        return values

    @field_validator("students")
    @classmethod
    def _named(cls, values: dict[str, Entry]) -> dict[str, Entry]:
        for name in values:
            if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
                raise ValueError(f"{name!r} must be of small letters, digits, dots and dashes: it names a folder")
        return values

    def run(self, name: str, seed: int) -> DistillRun:
        """Settings of one student's training.

        Raises:
            SettingsError: the recipe or a setting is invalid; the message names the student.
        """
        entry = self.students[name]
        try:
            found = load_run(entry.recipe)
            if not isinstance(found, DistillRun):
                raise SettingsError(f"{entry.recipe} is a {found.kind} run")
            found = changed(found, {"teacher": teacher_settings(found, self.teacher)})
            for settings in (self.shared, entry.settings, {"train.seed": seed}):
                found = changed(found, settings)
        except SettingsError as error:
            raise SettingsError(f"students.{name}: {error}") from None
        return found


def read_benchmark(path: Path) -> Benchmark:
    """Read a benchmark's file.

    Raises:
        SettingsError: not a file of YAML, unknown or invalid settings.
    """
    if not path.is_file():
        raise SettingsError(f"FILE must be a benchmark's file, got {path}. Try: benchmarks/worlds/digits.yaml")
    values = read_settings(path)
    try:
        return TypeAdapter(Benchmark).validate_python(values)
    except ValidationError as error:
        raise SettingsError(f"{path}:\n{explain(error, values)}") from None
