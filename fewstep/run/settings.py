"""Run files: strict reading, overrides from the command line, and explained errors.

An unknown key is an error that names it and the known keys. The resolved run is stored with its results, so that the run
folder documents itself.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from fewstep.run.pretraining import PretrainRun
from fewstep.run.recipes import find_recipe
from fewstep.run.specs import DistillRun, R, Run
from fewstep.system.bounds import QUOTED, TEXT_BYTES, printable, read_file, shown
from fewstep.system.choices import choices
from fewstep.system.errors import FileError, SettingsError
from fewstep.system.files import atomic_write
from fewstep.system.outside import use
from fewstep.system.strict_yaml import read_yaml, write_yaml
from fewstep.system.tagged import Tagged
from fewstep.teachers import DiffusersTeacher

__all__ = ["dump_run", "find_pipeline", "load_run", "read_settings", "text_to_image_teacher", "validated"]

MOST_PROBLEMS = 20  # that one message names


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
    if odd := [*_switches(values, run.model_dump()), *_endless(run.model_dump())]:
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


def _switches(given: Any, read: Any, where: str = "") -> Iterator[str]:
    """Lines about yes, no, on, off, true and false given for a number: pydantic would convert them to 1 and 0."""
    if isinstance(given, bool) and not isinstance(read, bool) and read is not None:
        yield f"  {where}: must be a number, got {str(given).lower()} (in YAML, yes, no, on and off mean true and false)"
    for name, value, other in _inside(given, read):
        yield from _switches(value, other, f"{where}.{name}".strip("."))


def _endless(values: Any, where: str = "") -> Iterator[str]:
    """Lines about numbers that are not finite, which no setting accepts."""
    if isinstance(values, float) and not math.isfinite(values):
        yield f"  {where}: must be a finite number, got {values}"
    for name, value, _ in _inside(values, values):
        yield from _endless(value, f"{where}.{name}".strip("."))


def _inside(one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Iterate over the entries of two nested values with the same names or positions."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        yield from ((str(name), value, other[name]) for name, value in one.items() if name in other)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        yield from ((str(index), *pair) for index, pair in enumerate(zip(one, other, strict=True)))


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


def explain(error: ValidationError, values: Mapping[str, Any]) -> str:
    """Format a pydantic error as lines `path: problem`, without the tags of unions in the path.

    Args:
        error: error of validating a run.
        values: the validated settings.
    """
    lines, tags = [], _tags()
    for problem in error.errors()[:MOST_PROBLEMS]:
        where = ".".join(shown(str(part), quote=False) for part in problem["loc"] if part not in tags) or "the file"
        message = problem["msg"].removeprefix("Value error, ")
        tag = str(problem.get("ctx", {}).get("tag", ""))
        if len(tag) > QUOTED:
            message = message.replace(tag, shown(tag, quote=False))
        if problem["type"] == "extra_forbidden":
            message = (
                f"unknown key (its value is {shown(problem['input'])}); known keys: "
                f"{', '.join(_siblings(problem['loc'], values))}"
            )
        elif problem["type"] not in ("missing", "value_error", "union_tag_not_found"):
            message += f" (it is {shown(problem['input'])})"
        lines.append(f"  {where}: {printable(message)}")
    if error.error_count() > MOST_PROBLEMS:
        lines.append(f"  and {error.error_count() - MOST_PROBLEMS:,} more")
    return "\n".join(lines)


def _records(annotation: Any) -> list[type[BaseModel]]:
    """Record types within an annotation."""
    if typing.get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [record for argument in typing.get_args(annotation) for record in _records(argument)]


def _tags() -> frozenset[str]:
    """Tags of the closed unions ("distill", "karras", ...): pydantic puts them into the paths of its errors."""
    todo, seen = _records(Run), set()
    while todo:
        record = todo.pop()
        if record not in seen:
            seen.add(record)
            todo += [found for field in record.model_fields.values() for found in _records(field.annotation)]
            todo += choices(record).values() if issubclass(record, Tagged) else []
    return frozenset(tag for record in seen if not issubclass(record, Tagged) and (tag := _tag(record)) is not None)


def _tag(record: type[BaseModel]) -> str | None:
    """Value of `kind` of a record in a closed union."""
    return record.model_fields["kind"].default if "kind" in record.model_fields else None


def _siblings(location: tuple[int | str, ...], values: Mapping[str, Any]) -> list[str]:
    """Known field names next to an unknown key, found by walking record types and values along its path."""
    found: list[type[BaseModel]] = _records(Run)
    value: Any = values
    for part in location[:-1]:
        if tagged := [record for record in found if _tag(record) == part]:
            found = tagged
            continue
        fields = [record.model_fields[str(part)] for record in found if part in record.model_fields]
        found = [record for field in fields for record in _records(field.annotation)] or found
        value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):
            found = [
                choices(record).get(str(value.get(record.tag_field)), record) if issubclass(record, Tagged) else record
                for record in found
            ]
    return sorted({name for record in found for name in record.model_fields})


def _mark(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" (line {mark.line + 1})" if mark else ""


def dump_run(run: BaseModel, path: Path) -> None:
    """Write a resolved run as YAML, in the order of its fields."""
    atomic_write(path, write_yaml(run.model_dump(mode="json")))


def override(run: R, arguments: Sequence[str]) -> R:
    """Apply command-line settings such as `--objective.gan-weight 1e-3`; `--help` prints them all and exits.

    Raises:
        SettingsError: the resulting run is invalid.
        SystemExit: with 2 for an unknown setting or a value of another type, which tyro explains.
    """
    import tyro
    from tyro.constructors import (
        ConstructorRegistry,
        PrimitiveConstructorSpec,
        PrimitiveTypeInfo,
        StructConstructorSpec,
        StructTypeInfo,
    )  # fmt: skip

    registry = ConstructorRegistry()
    own = [True]

    @registry.primitive_rule
    def null(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[None] | None:
        """Read `null`, as run files and the help call it; `None`, tyro's own word, too."""
        if info.type is not type(None):
            return None
        return PrimitiveConstructorSpec(
            nargs=1, metavar="null", choices=("null", "None"), instance_from_str=lambda words: None,
            is_instance=lambda value: value is None, str_from_instance=lambda value: ["null"],
        )  # fmt: skip

    @registry.struct_rule
    def unchecked(info: StructTypeInfo) -> StructConstructorSpec | None:
        """Collect a record's values without validation: the whole run is validated at once, with our own messages."""
        if not (own[0] and _records(info.type) == [info.type]):
            return None
        own[0] = False  # tyro's own rule for records, which finds their fields and help
        found = registry.get_struct_spec(info)
        own[0] = True
        assert isinstance(found, StructConstructorSpec)

        def values(**given: Any) -> dict[str, Any]:
            return given

        values.__doc__ = info.type.__doc__
        return dataclasses.replace(found, instantiate=values)

    given: Any = tyro.cli(
        type(run),
        default=run,
        args=list(arguments),
        config=(tyro.conf.AvoidSubcommands,),
        prog=f"fewstep {run.kind} RECIPE",
        registry=registry,
    )
    try:
        changed = type(run).model_validate(given)
    except ValidationError as error:
        raise SettingsError(f"command line:\n{explain(error, given)}") from None
    if odd := list(_endless(changed.model_dump())):
        raise SettingsError("command line:\n" + "\n".join(odd))
    return changed
