"""Options that several commands share: types, parsing, and help texts.

tyro makes a command line from a function's signature. This module adds numbers with a range, comma-separated lists, and the
processes that run a command. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

from tyro.conf import Fixed, Positional, Suppress, arg
from tyro.constructors import PrimitiveConstructorSpec

if TYPE_CHECKING:
    from fewstep.diffusion.guidance import Rule
    from fewstep.diffusion.solvers import Churn, Solver
    from fewstep.teachers.samplers import Best
else:  # tyro needs only the parsers; the real types would import torch
    Best = Churn = Rule = Solver = Any

__all__ = [
    "CALLS",
    "CHURN",
    "COUNT",
    "GUIDANCE",
    "INTERVAL",
    "METRICS",
    "NAMES",
    "PATH",
    "PORT",
    "SHARE",
    "SIZE",
    "SOLVER",
    "STEPS",
    "TEXT",
    "AsJson",
    "Batch",
    "Device",
    "DryRun",
    "Imports",
    "Line",
    "Processes",
    "Recipe",
    "RunFolder",
    "SamplerOption",
    "Settings",
    "SigmaInit",
    "about",
    "at_least_one",
    "at_most_one",
    "bring",
    "count_processes",
    "guidance_of",
    "several",
    "solver_of",
]

SAVING = "saving; press Ctrl-C again to quit without saving"  # the launcher's reply to Ctrl-C during training


def about(help: str, default: str | None = None, metavar: str | None = None) -> object:
    """Annotate an option with its help text; `default` describes the default if its value does not, "" hides it."""
    hint = None if default is None else f"(default: {default})" if default else ""
    return arg(help=help, metavar=metavar, help_behavior_hint=hint)


def _one(read: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec[Any]:
    """Option with one value."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
    )


def at_least_one(read: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec[Any]:
    """Positional arguments, one or more."""

    def instance(words: list[str]) -> tuple[Any, ...]:
        if not words:
            raise ValueError("give one or more")
        return tuple(map(read, words))

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{metavar} ...",
        instance_from_str=instance,
        is_instance=lambda _: True,
        str_from_instance=lambda values: list(map(str, values)),
    )


def at_most_one(metavar: str) -> PrimitiveConstructorSpec[Any]:
    """Optional positional argument."""

    def instance(words: list[str]) -> str | None:
        if len(words) > 1:
            raise ValueError(f"give one, got {' '.join(words)}")
        return words[0] if words else None

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=instance,
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise ValueError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not _count(text) < 2**16:
        raise ValueError(f"must be 1 to 65535, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _sigma(text: str) -> float:
    if not 0 < _number(text) < math.inf:
        raise ValueError(f"must be a number above 0, got {text!r}. Try: 2.5")
    return float(text)


def _guidance(text: str) -> float:
    if not 0 <= _number(text) < math.inf:
        raise ValueError(f"must be a number of at least 0, got {text!r}. Try: 7.5")
    return float(text)


def _interval(text: str) -> tuple[float, float]:
    low, _, high = text.partition(",")
    if not 0 <= _number(low) < _number(high):
        raise ValueError(f"must be two rising noise levels sigma/alpha of at least 0, got {text!r}. Try: 0.3,5")
    return float(low), float(high)


def _share(text: str) -> float:
    if not 0 <= _number(text) <= 1:
        raise ValueError(f"must be a number between 0 and 1, got {text!r}. Try: 0.7")
    return float(text)


def _size(text: str) -> tuple[int, int]:
    width, by, height = text.partition("x")
    if not (
        by
        and width.isascii()
        and width.isdigit()
        and height.isascii()
        and height.isdigit()
        and int(width)
        and int(height)
    ):
        raise ValueError(f"must be WIDTHxHEIGHT in pixels, got {text!r}. Try: 1344x768")
    return int(width), int(height)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise ValueError(f"must be names separated by commas, each once, got {text!r}")
    return names


def _metrics(text: str) -> list[str]:
    """Names of metrics, possibly none; the command checks that they exist."""
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _calls(text: str) -> list[int]:
    from fewstep.students.sample import parse_calls

    return parse_calls(text)


def _churn(text: str) -> Churn:
    from fewstep.diffusion.solvers import Churn

    try:
        churn = Churn(*map(float, text.split(",")))
    except (ValueError, TypeError):
        churn = Churn(0.0)
    if not (0 < churn.amount < math.inf and 0 <= churn.low < churn.high and 0 < churn.inflate < math.inf):
        raise ValueError(
            f"must be S, or S,LOW,HIGH,INFLATE, with S and INFLATE above 0 and LOW below HIGH, got {text!r}. "
            "Try: 40,0.05,50,1.003"
        )
    return churn


def _solver(text: str) -> Solver | Best:
    from fewstep.diffusion.solvers import Method, Solver
    from fewstep.teachers.samplers import Best

    if text == "best":
        return Best()

    name, *numbers = (part.strip() for part in text.split(","))
    if name not in get_args(Method) or len(numbers) > 3:
        raise ValueError(
            f"must be one of {', '.join(get_args(Method))}, then SIGMA_MIN,SIGMA_MAX,RHO if you like, got {text!r}. Try: "
            "dpmpp-2m,0.03,40,7"
        )
    try:
        least, most, rho = (None if word == "model" else float(word) for word in (numbers + ["model"] * 3)[:3])
    except ValueError:
        raise ValueError(f"must have numbers after the sampler's name, got {text!r}. Try: dpmpp-2m,0.03,40,7") from None
    return Solver(cast(Method, name), least, most, rho)


TEXT = _one(str, "TEXT")
PATH = _one(Path, "PATH")
COUNT = _one(_count, "N")
PORT = _one(_port, "N")
GUIDANCE = _one(_guidance, "SCALE")
INTERVAL = _one(_interval, "LOW,HIGH")
SHARE = _one(_share, "SHARE")
SIZE = _one(_size, "WIDTHxHEIGHT")
NAMES = _one(_names, "NAME,...")
METRICS = _one(_metrics, "NAME,...")
CALLS = _one(_calls, "N,...")
STEPS = _one(lambda text: [_count(part.strip()) for part in text.split(",")], "N,...")
CHURN = _one(_churn, "S[,LOW,HIGH,INFLATE]")
SOLVER = _one(_solver, "NAME[,SIGMA_MIN,SIGMA_MAX,RHO]")

SamplerOption = Annotated[
    Solver | Best | None,
    SOLVER,
    about(
        "a teacher's sampler: heun, euler (DDIM), dpmpp-2m, unipc-2 or unipc-3 (also with -bh1), with a range of noise levels if "
        "you like, such as "
        "dpmpp-2m,0.03,40,7; best: what `fewstep tune-sampler` found",
        "heun over the model's range",
    ),
]

Recipe = Positional[
    Annotated[str | None, at_most_one("RECIPE"), about("a run file, a run folder, or the name of a shipped recipe", "")]
]
RunFolder = Annotated[Path | None, PATH, about("run folder; the same folder resumes", "runs/<recipe>", "FOLDER")]
DryRun = Annotated[bool, about("print the resolved run and its cost, train nothing", "")]
Processes = Annotated[str, about("processes on this machine; auto: one per core without a GPU", metavar="N")]
Batch = Annotated[int, COUNT, about("images per batch; does not change the images")]
Device = Annotated[str, about("auto, cpu, cuda or cuda:N", metavar="DEVICE")]
SigmaInit = Annotated[
    float | None,
    _one(_sigma, "SIGMA"),
    about("treat a .pkl file as a one-step generator at this noise level (SiD, SiDA: 2.5), not as a teacher", ""),
]
Imports = Annotated[
    Sequence[str],
    NAMES,
    about("Python files and modules that add methods, teachers, networks or data", "those of the run file", "FILE,..."),
]
AsJson = Annotated[bool, about("print JSON instead of a table, for other programs", "")]
Settings = Suppress[Fixed[tuple[str, ...]]]
"""Further arguments: settings of the run, such as `--train.images 1000`."""
Line = Suppress[Fixed[tuple[str, ...]]]
"""The whole command line, for the worker processes and for the results' provenance."""


def bring(imports: Sequence[str]) -> None:
    """Import the files and modules of `--imports`, for a command that reads models.

    Raises:
        SettingsError: one does not exist, or cannot be imported.
    """
    from fewstep.system.outside import use

    use(imports, Path(), "--imports")


def count_processes(wanted: str, cuda: bool) -> int:
    """Number of processes for `--processes`.

    Raises:
        ValueError: neither a number nor auto.
    """
    from fewstep.system.launch import default_processes

    if wanted == "auto":
        return default_processes(cuda)
    try:
        return _count(wanted)
    except ValueError:
        raise ValueError(f"--processes must be a number of at least 1, or auto, got {wanted!r}") from None


def solver_of(sampler: Solver | Best | None, churn: Churn | None) -> Solver | Best:
    """Combine `--sampler` and `--churn`.

    Raises:
        ValueError: churn for another sampler than Heun's.
    """
    from dataclasses import replace

    from fewstep.diffusion.solvers import Solver
    from fewstep.teachers.samplers import Best

    if isinstance(sampler, Best):
        if churn is not None:
            raise ValueError("`churn` must come with the sampler `heun`, got `best`. Try: leave one of them out")
        return sampler

    return replace(sampler or Solver(), churn=churn)


def guidance_of(scale: float | None, interval: tuple[float, float] | None, rescale: float) -> Rule | float | None:
    """Combine `--guidance` with its limits.

    Raises:
        ValueError: limits without guidance.
    """
    from fewstep.diffusion.guidance import guidance_rule

    if interval is None and rescale == 0:
        return scale
    return guidance_rule(scale, interval, rescale)


def several(line: Sequence[str], processes: int, *answer: str) -> int | None:
    """Run a command line in several processes, once each; returns the exit code, or None if this process does the work.

    Args:
        line: the command's arguments.
        processes: their number; does nothing for one process, or inside a worker.
        answer: reply to a first Ctrl-C.
    """
    if processes == 1 or "RANK" in os.environ:
        return None
    from fewstep.system.launch import relaunch

    return relaunch(line, processes, *answer)


def as_json(value: Any) -> None:
    """Print a value as JSON on stdout: numbers as they are, records as objects."""
    from dataclasses import asdict, is_dataclass

    def plain(item: Any) -> Any:
        return asdict(item) if is_dataclass(item) and not isinstance(item, type) else str(item)

    print(json.dumps(value, indent=2, ensure_ascii=False, default=plain))
