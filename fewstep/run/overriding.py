"""Settings from the command line, such as `--objective.gan-weight 1e-3`. tyro finds them; pydantic checks the whole run."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Sequence
from typing import Any, cast

from pydantic import ValidationError

from fewstep.run.explaining import explain, known_settings, odd_numbers, records
from fewstep.run.specs import R
from fewstep.system.bounds import shown
from fewstep.system.errors import SettingsError

__all__ = ["override"]


def override(run: R, arguments: Sequence[str]) -> R:
    """Apply command-line settings; `--help` prints them all and exits.

    Raises:
        SettingsError: an unknown setting, or the resulting run is invalid.
        SystemExit: with 2 for a setting without its value, which tyro explains.
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

    @registry.primitive_rule
    def word(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        """Keep a number or a choice as it was typed: it is checked as that of a run file."""
        if info.type in (int, float):
            metavar, read = info.type.__name__.upper(), cast("Callable[[str], Any]", info.type)
        elif typing.get_origin(info.type) is typing.Literal:
            choices = {str(choice): choice for choice in typing.get_args(info.type)}
            metavar, read = f"{{{','.join(choices)}}}", lambda text: choices[text]
        else:
            return None

        def value(words: list[str]) -> Any:
            try:
                return read(words[0])
            except (ValueError, KeyError):
                return words[0]

        return PrimitiveConstructorSpec(
            nargs=1, metavar=metavar, instance_from_str=value,
            is_instance=lambda value: isinstance(value, int | float | str), str_from_instance=lambda value: [str(value)],
        )  # fmt: skip

    @registry.struct_rule
    def unchecked(info: StructTypeInfo) -> StructConstructorSpec | None:
        """Collect a record's values without validation: the whole run is validated at once, with our own messages."""
        if not (own[0] and records(info.type) == [info.type]):
            return None
        own[0] = False  # tyro's own rule for records, which finds their fields and help
        found = registry.get_struct_spec(info)
        own[0] = True
        assert isinstance(found, StructConstructorSpec)

        def values(**given: Any) -> dict[str, Any]:
            return given

        values.__doc__ = info.type.__doc__
        return dataclasses.replace(found, instantiate=values)

    given, strange = tyro.cli(
        type(run),
        default=run,
        args=list(arguments),
        config=(tyro.conf.AvoidSubcommands,),
        prog=f"fewstep {run.kind} RECIPE",
        registry=registry,
        return_unknown_args=True,
    )
    if strange:
        raise SettingsError(f"command line:\n{_strange(strange, arguments, list(known_settings(run.model_dump())))}")
    values: Any = given
    try:
        changed = type(run).model_validate(values)
    except ValidationError as error:
        raise SettingsError(f"command line:\n{explain(error, values)}") from None
    if odd := odd_numbers(changed.model_dump()):
        raise SettingsError("command line:\n" + "\n".join(odd))
    return changed


def _strange(words: Sequence[str], arguments: Sequence[str], known: Sequence[str]) -> str:
    """Lines about words that are no setting of the run.

    Args:
        words: these words.
        arguments: all words.
        known: paths of the run's settings.
    """
    lines = []
    for index, word in enumerate(words):
        before = arguments[arguments.index(word) - 1] if word in arguments[1:] else ""
        if word.startswith("--"):
            name = word.partition("=")[0].removeprefix("--").replace("-", "_")
            near = difflib.get_close_matches(name, known, 1)
            hint = f"Did you mean {near[0]}?" if near else "Try: --help, which lists all settings"
            lines.append(f"  {shown(name, quote=False)}: unknown key. {hint}")
        elif index == 0 or words[index - 1] != before:  # else it is the value of an unknown setting
            hint = f"{before} takes no value: leave it out" if before.startswith("--") else f"--SETTING {word}"
            lines.append(f"  {shown(word, quote=False)}: must belong to a setting. Try: {hint}")
    return "\n".join(lines)
