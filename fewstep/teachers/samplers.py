"""A teacher's best sampler for a number of calls, in a file beside its weights. `fewstep tune-sampler` writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.diffusion.guidance import Rule, plain
from fewstep.diffusion.solvers import Solver
from fewstep.system.bounds import parse_json, read_file
from fewstep.system.console import note
from fewstep.system.errors import FileError, TeacherError
from fewstep.teachers.base import Teacher
from fewstep.teachers.native import NativeTeacher

__all__ = ["Best", "as_record", "from_record", "read_samplers", "samplers_file"]

FORMAT = "fewstep samplers 1"


def samplers_file(teacher: str) -> Path:
    """Find where a teacher's samplers are kept: in a pipeline's folder, else beside the file of the weights.

    Raises:
        TeacherError: no such teacher.
    """
    if (Path(teacher) / "model_index.json").exists():
        return Path(teacher) / "samplers.json"
    return NativeTeacher(path=teacher).file().with_suffix(".samplers.json")


def as_record(solver: Solver) -> dict[str, Any]:
    """Method and range of a solver, ready for JSON."""
    low, high, rho = solver.range
    return {"method": solver.method, "sigma_min": low, "sigma_max": high, "rho": rho}


def from_record(record: dict[str, Any]) -> Solver:
    """Read a solver from a record.

    Raises:
        KeyError, TypeError, ValueError: it is not one of `as_record`.
    """
    return Solver(record["method"], *(record[key] for key in ("sigma_min", "sigma_max", "rho")))


def read_samplers(path: Path) -> dict[str, Any]:
    """Read a file of samplers.

    Raises:
        FileError: it is not one.
    """
    try:
        found = parse_json(read_file(path, 2**24).decode())
    except ValueError as error:
        raise FileError(
            f"{path} cannot be read as JSON ({error}). Try: remove it, and run fewstep tune-sampler"
        ) from None
    parts = (("tries", list), ("best", dict), ("about", dict))
    good = isinstance(found, dict) and found.get("format") == FORMAT
    good = good and all(isinstance(found.get(key), kind) for key, kind in parts)
    if not (good and all(_is_try(row) for row in found["tries"])):
        raise FileError(f"{path} must hold {FORMAT}, got another file. Try: remove it, and run fewstep tune-sampler")
    return dict(found)


def _is_try(row: Any) -> bool:
    try:
        from_record(row)
        return all(isinstance(row[key], int | float) for key in ("calls", "samples", "fid"))
    except (KeyError, TypeError, ValueError):
        return False


@dataclass(frozen=True)
class Best:
    """The sampler that `fewstep tune-sampler` found best for a teacher and a number of calls."""

    def of(self, teacher: Teacher, calls: int, guidance: Rule | float | None = None) -> Solver:
        """Read it, and say which it is.

        Raises:
            TeacherError: none was looked for, or of other weights or guidance.
            FileError: the file is damaged.
        """
        path = samplers_file(teacher.name)
        again = f"Try: fewstep tune-sampler {teacher.name} --calls {calls}"
        if not path.exists():
            raise TeacherError(f"`sampler` must be found before it is the best, got no {path}. {again}")
        file = read_samplers(path)
        for key, own in (("sha256", teacher.sha256), ("guidance", plain(guidance))):
            if file["about"].get(key) != own:
                raise TeacherError(
                    f"`sampler` must be of a teacher with {key} {own}, got {path} with {file['about'].get(key)}. Try: remove it, "
                    f"then fewstep tune-sampler {teacher.name}"
                )
        known = ", ".join(file["best"])
        if str(calls) not in file["best"]:
            raise TeacherError(f"`sampler` must be known for {calls} calls, got {path} with {known or 'none'}. {again}")
        record = file["best"][str(calls)]
        try:
            solver, fid, samples = from_record(record), float(record["fid"]), int(record["samples"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"{path} must hold a sampler for {calls} calls, got {json.dumps(record)} ({error})"
            ) from None
        note(
            f"the best sampler of {teacher.name} at {calls} call(s) is {solver} (FID {fid:.2f} of {samples:,} samples, {path})"
        )
        return solver
