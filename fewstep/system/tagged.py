"""Records that a setting chooses among by a tag: methods, teachers, networks and data sets, fewstep's and other people's."""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from fewstep.system.errors import SettingsError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Tagged"]


class Tagged(BaseModel, ABC):
    """Interface of records that carry a tag: `kind: Literal["mine"] = "mine"`.

    A field that is annotated with an interface takes each of its final classes: those of this package, and those that
    `fewstep.system.outside` has imported.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tag_field: ClassVar[str] = "kind"
    """Name of the field that holds the tag."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls._chosen) if inspect.isabstract(cls) else handler(source)

    @classmethod
    def choices(cls) -> dict[str, type[Self]]:
        """Final classes of an interface by tag.

        Raises:
            SettingsError: two have the same tag, or one from outside is not complete.
        """
        from fewstep.system import outside  # not above: a method's file loads little

        found: dict[str, type[Self]] = {}
        ours = (record for record in _below(cls) if record.__module__.partition(".")[0] == "fewstep")
        for record in [*ours, *(record for record in outside.classes() if issubclass(record, cls))]:
            field = record.model_fields.get(cls.tag_field)
            tag = field.default if field else None
            if inspect.isabstract(record):
                if isinstance(tag, str):
                    lacking = ", ".join(sorted(record.__abstractmethods__))
                    raise SettingsError(f"{_place(record)} must define {lacking}, as {cls.__name__} asks for")
            elif not isinstance(tag, str):
                raise SettingsError(
                    f'{_place(record)} must have a tag, got none. Try: {cls.tag_field}: Literal["NAME"] = "NAME"'
                )
            elif found.setdefault(tag, record) is not record:
                raise SettingsError(
                    f"`{cls.tag_field}: {tag}` must mean one class, got {_place(found[tag])} and {_place(record)}. "
                    "Try: another name for yours"
                )
        return found

    @classmethod
    def _chosen(cls, value: Any) -> Self:
        """The record that a value describes."""
        from fewstep.system import outside

        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"must be settings such as `{cls.tag_field}: NAME`, got {value!r}")
        choices, tag = cls.choices(), value.get(cls.tag_field)
        if tag not in choices and outside.follow_mentions():
            choices = cls.choices()
        if tag not in choices:
            got = f"`{cls.tag_field}` must be one of {', '.join(sorted(choices))}, got {tag or 'none'}"
            raise ValueError(f"{got}{outside.way_out()}")
        return choices[tag].model_validate(value)


def _below(cls: type[Tagged]) -> Iterator[type[Any]]:
    for record in cls.__subclasses__():
        yield record
        yield from _below(record)


def _place(record: type[Any]) -> str:
    """A class by name and file."""
    return f"{record.__qualname__} in {inspect.getsourcefile(record)}"
