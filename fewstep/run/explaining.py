"""One form for every invalid setting of a run file or a command line: its name, what is allowed, its value, a way out.

    train.images: must be above 0, got 0. Try: 300000, the default

pydantic's problems are translated here. Knows no file and no command.
"""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fewstep.run.specs import Run
from fewstep.system.bounds import QUOTED, printable, shown
from fewstep.system.choices import choices
from fewstep.system.tagged import Tagged

__all__ = ["all_records", "explain", "known_settings", "odd_numbers", "records", "unknown"]

MOST_PROBLEMS = 20  # that one message names
REWORDED = {  # pydantic's types of problems, with its own names of the bounds
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of at most 19 digits",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a text",
    "string_too_short": "must be a text of at least {min_length} letters",
    "string_too_long": "must be a text of at most {max_length} letters",
    "path_type": "must be a path",
    "literal_error": "must be one of {expected}",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "too_short": "must have at least {min_length} values",
    "too_long": "must have at most {max_length} values",
    "dict_type": "must hold settings by name",
    "model_type": "must hold settings by name",
    "model_attributes_type": "must hold settings by name",
    "none_required": "must be null",
    "union_tag_invalid": "must have {discriminator} of {expected_tags}",
}


def explain(error: ValidationError, values: Mapping[str, Any]) -> str:
    """Format a pydantic error as lines `path: problem`, without the tags of unions in the path.

    Args:
        error: error of validating a run.
        values: the validated settings.
    """
    lines, tags = [], _tags()
    for problem in error.errors()[:MOST_PROBLEMS]:
        where = ".".join(shown(str(part), quote=False) for part in problem["loc"] if part not in tags) or "the file"
        lines.append(f"  {where}: {printable(_said(dict(problem), values))}")
    if error.error_count() > MOST_PROBLEMS:
        lines.append(f"  and {error.error_count() - MOST_PROBLEMS:,} more")
    return "\n".join(lines)


def _said(problem: dict[str, Any], values: Mapping[str, Any]) -> str:
    """Say what is wrong with a setting."""
    kind, given = problem["type"], shown(problem["input"])
    message = problem["msg"].removeprefix("Value error, ")
    tag = str(problem.get("ctx", {}).get("tag", ""))
    if len(tag) > QUOTED:
        message = message.replace(tag, shown(tag, quote=False))
    if kind == "extra_forbidden":
        return unknown(str(problem["loc"][-1]), given, sorted(_siblings(problem["loc"], values)))
    if kind == "missing":
        return "must be given"
    if kind in ("value_error", "union_tag_not_found"):
        return message
    if kind not in REWORDED:
        return f"{message} (it is {given})"
    # 0.0 is the bound 0 of a number with a point
    bounds = {
        name: f"{value:.17g}" if isinstance(value, float) else value for name, value in problem.get("ctx", {}).items()
    }
    rule = REWORDED[kind].format_map(bounds)
    if kind == "union_tag_invalid":
        return f"{rule}, got {shown(tag)}"
    field = _siblings(problem["loc"], values).get(str(problem["loc"][-1])) if problem["loc"] else None
    return f"{rule}, got {given}{_way_out(field)}"


def unknown(name: str, given: str, known: list[str]) -> str:
    """Say that no setting has a name.

    Args:
        name: the last part of its path.
        given: its value, for the message.
        known: names of the settings beside it.
    """
    near = difflib.get_close_matches(name, known, 1)
    return f"unknown key (its value is {given}); known keys: {', '.join(known)}" + (
        f". Did you mean {near[0]}?" if near else ""
    )


def _way_out(field: FieldInfo | None) -> str:
    """Name a setting's default, if a few letters say it."""
    if field is None or field.is_required():
        return ""
    default = field.get_default(call_default_factory=True)
    if default is None:
        return ". Try: null, the default"
    if isinstance(default, bool):
        default = str(default).lower()
    return f". Try: {default}, the default" if isinstance(default, int | float | str) else ""


def odd_numbers(read: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> list[str]:
    """Lines about numbers that pydantic takes without a word.

    Args:
        read: the settings as validated.
        given: the settings of a file.
    """
    return [*(_switches(given, read) if given is not None else ()), *_endless(read)]


def _switches(given: Any, read: Any, where: str = "") -> Iterator[str]:
    """Lines about yes, no, on, off, true and false given for a number: pydantic would convert them to 1 and 0."""
    if isinstance(given, bool) and not isinstance(read, bool) and read is not None:
        yield f"  {where}: must be a number, got {str(given).lower()} (in YAML, yes, no, on and off mean true and false)"
    for name, value, other in _inside(given, read):
        yield from _switches(value, other, f"{where}.{name}".strip("."))


def _endless(values: Any, where: str = "") -> Iterator[str]:
    """Lines about numbers that are not finite, within what other programs define."""
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


def records(annotation: Any) -> list[type[BaseModel]]:
    """Record types within an annotation."""
    if typing.get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [record for argument in typing.get_args(annotation) for record in records(argument)]


def all_records() -> set[type[BaseModel]]:
    """Types of all records that a run file can hold."""
    todo, seen = records(Run), set[type[BaseModel]]()
    while todo:
        record = todo.pop()
        if record not in seen:
            seen.add(record)
            todo += [found for field in record.model_fields.values() for found in records(field.annotation)]
            todo += choices(record).values() if issubclass(record, Tagged) else []
    return seen


def _tags() -> frozenset[str]:
    """Tags of the closed unions ("distill", "karras", ...): pydantic puts them into the paths of its errors."""
    tags = (_tag(record) for record in all_records() if not issubclass(record, Tagged))
    return frozenset(tag for tag in tags if tag is not None)


def _tag(record: type[BaseModel]) -> str | None:
    """Value of `kind` of a record in a closed union."""
    return record.model_fields["kind"].default if "kind" in record.model_fields else None


def _siblings(location: tuple[int | str, ...], values: Mapping[str, Any]) -> dict[str, FieldInfo]:
    """Settings beside the last part of a path, found by walking record types and values along it."""
    found: list[type[BaseModel]] = records(Run)
    value: Any = values
    for part in location[:-1]:
        if tagged := [record for record in found if _tag(record) == part]:
            found = tagged
            continue
        fields = [record.model_fields[str(part)] for record in found if part in record.model_fields]
        if not fields and isinstance(part, int):
            return {}  # an entry of a list has no name
        found = [record for field in fields for record in records(field.annotation)] or found
        value = value.get(part) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):
            found = [
                choices(record).get(str(value.get(record.tag_field)), record) if issubclass(record, Tagged) else record
                for record in found
            ]
    return {name: field for record in found for name, field in record.model_fields.items()}


def known_settings(values: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Paths of all settings of a run's record."""
    for name, value in values.items():
        yield f"{where}{name}"
        if isinstance(value, Mapping):
            yield from known_settings(value, f"{where}{name}.")
