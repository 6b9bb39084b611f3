"""Interface of records chosen by a tag: methods, teachers, networks and data sets, fewstep's and other people's."""

from __future__ import annotations

import inspect
from abc import ABC
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from fewstep.system.record import Record

if TYPE_CHECKING:
    from typing_extensions import Self


class Tagged(Record, ABC):
    """Interface of records with a tag, such as `kind: Literal["mine"] = "mine"`; a field of this type accepts any of them."""

    tag_field: ClassVar[str] = "kind"
    """Name of the tag's field."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(cls._chosen) if inspect.isabstract(cls) else handler(source)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Any of the records that a tag can choose, for editors (`fewstep schema`)."""
        if not inspect.isabstract(cls):
            return handler(schema)
        from fewstep.system.choices import choices

        return {"anyOf": [handler(record.__pydantic_core_schema__) for record in choices(cls).values()]}

    @classmethod
    def _chosen(cls, value: Any) -> Self:
        from fewstep.system.choices import chosen  # imported late, so that a method's file loads little

        return chosen(cls, value)
