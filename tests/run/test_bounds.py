"""Every number of every settings class has a bound, or is listed here as one where any finite number is right."""

import inspect
import typing
from collections.abc import Iterator

import annotated_types
import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from fewstep.run.explaining import all_records
from fewstep.system.record import Record

ANY = {
    ("DiffusersTeacher", "lora_scale"): "a LoRA may be subtracted",
    ("Latents", "shift"): "the mean of latents",
    ("Latents", "mean"): "likewise, a channel each",
    ("LogNormalNoise", "mean"): "a logarithm",
    ("MixtureTeacher", "means"): "coordinates",
    ("SiD", "alpha"): "the loss is linear in it; the paper tries negative ones, too",
    ("SiDA", "alpha"): "the same",
}
BOUNDS = (annotated_types.Gt, annotated_types.Ge, annotated_types.Lt, annotated_types.Le)


def classes() -> set[type[BaseModel]]:
    """All records that a run file can hold."""
    return {
        record
        for record in all_records()
        if record.__module__.startswith("fewstep.") and not inspect.isabstract(record)
    }


def free(annotation: object, bounded: bool = False) -> Iterator[type]:
    """Number types within an annotation that no bound limits; a bound of a field is that of the number it holds."""
    if annotation in (int, float):
        if not bounded:
            yield annotation
        return
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *marks = typing.get_args(annotation)
        marks += [part for mark in marks for part in getattr(mark, "metadata", ())]
        yield from free(inner, any(isinstance(mark, BOUNDS) for mark in marks))
        return
    within = bounded and typing.get_origin(annotation) not in (tuple, list, dict)
    for argument in typing.get_args(annotation):
        yield from free(argument, within)


def checked_by_itself(record: type[BaseModel]) -> set[str]:
    """Fields with a validator of their own."""
    return {name for found in record.__pydantic_decorators__.field_validators.values() for name in found.info.fields}


def fields():
    for record in sorted(classes(), key=lambda record: record.__name__):
        for name, field in record.model_fields.items():
            yield record, name, field


def test_every_number_has_a_bound():
    unlimited = {
        (record.__name__, name)
        for record, name, field in fields()
        if any(free(field.annotation, any(isinstance(mark, BOUNDS) for mark in field.metadata)))
        and name not in checked_by_itself(record)
    }
    assert unlimited == ANY.keys()


def test_the_search_finds_what_is_free():
    positive = typing.Annotated[int, annotated_types.Gt(0)]
    assert not list(free(positive)) and not list(free(tuple[positive, ...] | None)) and not list(free(int | None, True))
    assert list(free(tuple[int, ...], True)) == [int] and list(free(tuple[tuple[float, ...], ...] | None)) == [float]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_number_is_endless(value):
    """Each field with a number by itself, also within its lists."""
    checked = 0
    for record, name, field in fields():
        if float not in {*_numbers(field.annotation)}:
            continue
        assert record.model_config["allow_inf_nan"] is False
        depth = 0 if name != "means" else 2
        sized = typing.get_origin(field.annotation) is tuple or "tuple" in str(field.annotation)
        given = (value, value) if sized and not depth else ((value,),) if depth else value
        with pytest.raises(ValidationError) as error:
            record.model_validate({name: given})
        assert any(problem["loc"][:1] == (name,) for problem in error.value.errors()), (record, name, error.value)
        checked += 1
    assert checked > 50


def _numbers(annotation: object) -> Iterator[type]:
    if annotation in (int, float):
        yield annotation
    for argument in typing.get_args(annotation):
        if not (isinstance(argument, type) and issubclass(argument, BaseModel)):
            yield from _numbers(argument)


def test_records_outside_a_run_refuse_them_too():
    class Mine(Record):
        value: float

    with pytest.raises(ValidationError, match="finite"):
        TypeAdapter(Mine).validate_python({"value": float("nan")})
