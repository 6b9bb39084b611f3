"""Classes that a tag can choose: those of this package, and those imported by `fewstep.system.outside`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from fewstep.system import outside
from fewstep.system.bounds import shown
from fewstep.system.errors import SettingsError
from fewstep.system.tagged import Tagged

__all__ = ["choices", "chosen"]

T = TypeVar("T", bound=Tagged)


def choices(interface: type[Any]) -> dict[str, type[Any]]:
    """Final classes of an interface by tag.

    Raises:
        SettingsError: two have the same tag, or one from outside is incomplete.
    """
    found: dict[str, type[Any]] = {}
    ours = (record for record in _below(interface) if record.__module__.partition(".")[0] == "fewstep")
    for record in [*ours, *(record for record in outside.classes() if issubclass(record, interface))]:
        field = record.model_fields.get(interface.tag_field)
        tag = field.default if field else None
        if inspect.isabstract(record):
            if isinstance(tag, str):
                lacking = ", ".join(sorted(record.__abstractmethods__))
                raise SettingsError(f"{_place(record)} must define {lacking}, as {interface.__name__} requires")
        elif not isinstance(tag, str):
            raise SettingsError(
                f'{_place(record)} must have a tag, got none. Try: {interface.tag_field}: Literal["NAME"] = "NAME"'
            )
        elif found.setdefault(tag, record) is not record:
            raise SettingsError(
                f"`{interface.tag_field}: {tag}` must mean one class, got {_place(found[tag])} and {_place(record)}. "
                "Try: another tag for yours"
            )
    return found


def chosen(interface: type[T], value: Any) -> T:
    """Build the record that a value describes; a record is returned unchanged.

    Raises:
        ValueError: no tag, or an unknown tag.
        ValidationError: invalid settings.
    """
    if isinstance(value, interface):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"must be settings such as `{interface.tag_field}: NAME`, got {shown(value)}")
    known, tag = choices(interface), value.get(interface.tag_field)
    if not isinstance(tag, str | None):
        raise ValueError(f"`{interface.tag_field}` must be a name, got {shown(tag)}")
    if tag not in known and outside.follow_mentions():
        known = choices(interface)
    if tag not in known:
        got = f"`{interface.tag_field}` must be one of {', '.join(sorted(known))}, got {shown(tag) if tag else 'none'}"
        raise ValueError(f"{got}{outside.way_out()}")
    record: T = known[tag].model_validate(value)
    return record


def _below(cls: type[Any]) -> Iterator[type[Any]]:
    for record in cls.__subclasses__():
        yield record
        yield from _below(record)


def _place(record: type[Any]) -> str:
    """Name and file of a class."""
    return f"{record.__qualname__} in {inspect.getsourcefile(record)}"
