"""Run files: strict reading, overrides from the command line, and explained errors.

An unknown key is an error that names it and the known keys. The resolved run is stored with its results, so that the run
folder documents itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from fewstep.run.explaining import explain, odd_numbers
from fewstep.run.pretraining import PretrainRun
from fewstep.run.recipes import find_recipe
from fewstep.run.specs import DistillRun, Run
from fewstep.system.bounds import TEXT_BYTES, read_file, shown
from fewstep.system.errors import FileError, SettingsError
from fewstep.system.files import atomic_write
from fewstep.system.outside import use
from fewstep.system.strict_yaml import read_yaml, write_yaml
from fewstep.teachers import DiffusersTeacher

__all__ = ["dump_run", "find_pipeline", "load_run", "read_settings", "text_to_image_teacher", "validated"]


def load_run(path: Path | str, imports: Sequence[str] | None = None) -> PretrainRun | DistillRun:
    """Read a run file, a recipe by name, or a run folder, and import the files that it names.

    Args:
        path: path or name.
        imports: files and modules to import instead of the run file's, relative to the working directory.

    Raises:
        SettingsError: no such file, not YAML, unknown or missing keys, wrong types: each named with its path in the file.
    """
    file = find_recipe(path)
    values = read_settings(file)
    if "kind" not in values:
        raise SettingsError(f"{file}: `kind:` is missing. Try: `kind: distill` or `kind: pretrain`")
    named = values.get("imports") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise SettingsError(
            f"{file}:\n  imports: must be a list of files and modules, got {shown(named)}. Try: [my_method.py]"
        )
    values["imports"] = use(named, file.parent, str(file)) if imports is None else use(imports, Path(), "--imports")
    return validated(values, file)


def validated(values: Mapping[str, Any], file: Path) -> PretrainRun | DistillRun:
    """Validate settings as a run; their imports must be loaded already.

    Args:
        values: the settings.
        file: their file, for messages.

    Raises:
        SettingsError: unknown or missing keys, wrong types.
    """
    try:
        run: PretrainRun | DistillRun = TypeAdapter(Run).validate_python(values)
    except ValidationError as error:
        raise SettingsError(f"{file}:\n{explain(error, values)}") from None
    if odd := odd_numbers(run.model_dump(), values):
        raise SettingsError(f"{file}:\n" + "\n".join(odd))
    return run


def read_settings(file: Path) -> dict[str, Any]:
    """Read the settings of a run file without validation.

    Raises:
        SettingsError: it is not YAML, or holds no settings.
    """
    try:
        values = read_yaml(read_file(file, TEXT_BYTES))
    except yaml.YAMLError as error:
        first = shown((str(error).splitlines() or [""])[0], quote=False)
        raise SettingsError(f"{file} is not valid YAML: {first}{_mark(error)}") from None
    except FileError as error:
        raise SettingsError(str(error)) from None
    if not isinstance(values, dict):
        raise SettingsError(f"{file} must hold keys such as `teacher:` and `objective:`, got {type(values).__name__}")
    return values


def find_pipeline(name: str) -> DiffusersTeacher | None:
    """Pipeline with this folder or single file; None for the name of a run."""
    found = (Path(name) / "model_index.json").exists() or Path(name).suffix == ".safetensors"
    return DiffusersTeacher(path=name) if found else None


def text_to_image_teacher(name: str) -> DiffusersTeacher:
    """Text-to-image teacher of a run file or recipe, or of a pipeline's folder or single file.

    Raises:
        SettingsError: the run has no such teacher.
    """
    pipeline = find_pipeline(name)
    if pipeline is not None:
        return pipeline
    run = load_run(name)
    if isinstance(run, PretrainRun) and run.pipeline is not None:
        return run.pipeline
    if not isinstance(run, DistillRun) or not isinstance(run.teacher, DiffusersTeacher):
        raise SettingsError(
            f"{name} has no text-to-image teacher: prompts are for `teacher: {{kind: diffusers, path: ...}}`"
        )
    return run.teacher


def _mark(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" (line {mark.line + 1})" if mark else ""


def dump_run(run: BaseModel, path: Path) -> None:
    """Write a resolved run as YAML, in the order of its fields."""
    atomic_write(path, write_yaml(run.model_dump(mode="json")))
