"""The `fewstep` command: dispatch to the commands' functions, one-line errors, exit codes.

Imports no torch; neither do the commands before they run.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import tyro

from fewstep import __version__
from fewstep.cli import begin, completion, cost, demo, make, show, tools, train, tune
from fewstep.cli.memory import out_of_memory
from fewstep.run.recipes import list_recipes
from fewstep.system import outside
from fewstep.system.console import hush, note
from fewstep.system.errors import UserError
from fewstep.system.interrupt import INTERRUPTED, command_signals, interrupted

__all__ = ["main", "parse"]

COMMANDS: dict[str, Callable[..., int | None]] = {
    "demo": demo.demo,
    "pretrain": train.pretrain,
    "distill": train.distill,
    "init": begin.init,
    "fetch": begin.fetch,
    "prepare": make.prepare,
    "pairs": make.pairs,
    "bench": cost.bench,
    "plan": cost.plan,
    "sample": show.sample,
    "eval": show.eval_,
    "tune-sampler": tune.tune_sampler,
    "benchmark": tune.benchmark,
    "import": make.import_,
    "export": show.export,
    "ui": show.ui,
    "report": show.report,
    "recipes": show.recipes,
    "schema": tools.schema,
    "doctor": tools.doctor,
    "completion": completion.completion,
}
HELP = ("-h", "--help")
PIPE_CLOSED = 141  # 128 + SIGPIPE, as shells report it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for an error that the user can fix, 130 after Ctrl-C.

    Raises:
        SystemExit: with 2 for invalid arguments, with 0 after `--help`.
    """
    whole_process = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    hush()
    note.cache_clear()
    outside.forget()
    with command_signals(whole_process):
        try:
            try:
                return parse(arguments)() or 0
            finally:
                sys.stdout.flush()
        except BrokenPipeError:  # the reader closed the pipe, as in `fewstep recipes | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports an error at exit
            return PIPE_CLOSED
        except KeyboardInterrupt as stop:
            return _stopped(str(stop), arguments)
        except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
            if interrupted() and not _is_ours(error):
                if isinstance(error, ImportError):  # an interrupted import
                    return _stopped("", arguments)
                if isinstance(error, RuntimeError) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                    # most likely another process has gone
                    return _stopped(f"stopped without saving ({str(error).splitlines()[0]})", arguments)
            lacking = out_of_memory(error, arguments[0])
            if lacking is None and not _is_ours(error):
                if "FEWSTEP_PARENT" not in os.environ:
                    raise
                traceback.print_exc()
                return 3  # fewstep.system.launch.UNEXPLAINED: possibly the failure of another process, which reports it
            print(f"fewstep {arguments[0]}: {UserError(lacking or str(error))}", file=sys.stderr)
            return 1


def parse(arguments: Sequence[str]) -> Callable[[], int | None]:
    """Parse a command line into a call.

    Raises:
        SystemExit: with 2 for invalid arguments, with 0 after `--help`.
    """
    name, *words = arguments or HELP
    if name in HELP:
        print(_overview())
        raise SystemExit(0)
    if name == "--version":
        print(f"fewstep {__version__}")
        raise SystemExit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        _refuse(
            f"invalid choice: {name!r}. {f'Did you mean {near[0]}? ' if near else ''}Commands: {', '.join(COMMANDS)}"
        )
    _once(words)
    command = COMMANDS[name]
    takes = inspect.signature(command).parameters
    read = functools.partial(tyro.cli, _later(command), prog=f"fewstep {name}", config=(tyro.conf.FlagCreatePairsOff,))
    if "settings" not in takes:
        call = read(args=words)
    else:
        wanted = [word for word in words if word not in HELP]
        call, settings = read(args=wanted, return_unknown_args=True, add_help=False)
        if asks := len(wanted) < len(words):
            with contextlib.suppress(SystemExit):
                read(args=["--help"])
        if asks and call.keywords["recipe"] is None:
            known = ", ".join(list_recipes())
            return functools.partial(print, f"Recipes: {known}\nSettings of a recipe: fewstep {name} RECIPE --help")
        call.keywords["settings"] = (*settings, *(["--help"] if asks else []))
    if "line" in takes:
        call.keywords["line"] = tuple(arguments)
    return call


def _later(command: Callable[..., Any]) -> Callable[..., functools.partial[Any]]:
    """A function with a command's signature that returns the call instead of making it."""

    @functools.wraps(command)
    def bound(**options: Any) -> functools.partial[Any]:
        return functools.partial(command, **options)

    return bound


def _overview() -> str:
    """Return the text of `fewstep --help`: the commands, each with the first line of its help."""
    lines = [
        "usage: fewstep COMMAND ...",
        "",
        "Distil diffusion models into generators of one to four network calls.",
        "",
    ]
    for name, command in COMMANDS.items():
        first = (inspect.getdoc(command) or "").partition("\n")[0]
        lines.append(textwrap.fill(first, 80, initial_indent=f"  {name:13}", subsequent_indent=15 * " "))
    return "\n".join([*lines, "", "Options of a command: fewstep COMMAND --help. Version: fewstep --version"])


def _refuse(message: str) -> NoReturn:
    print(f"fewstep: {message}", file=sys.stderr)
    raise SystemExit(2)


def _once(arguments: Sequence[str]) -> None:
    """Refuse an option or a setting that is given twice; otherwise the last would win silently."""
    given: set[str] = set()
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        path, _, last = name.removeprefix("--").rpartition(".")
        name = f"{path}.{last.removeprefix('no-')}"
        if argument.startswith("--") and name != ".prompt":
            if name in given:
                _refuse(f"{argument.partition('=')[0]} is given twice: keep one of them")
            given.add(name)


def _stopped(said: str, arguments: list[str]) -> int:
    """Say how to resume after Ctrl-C."""
    if os.environ.get("RANK", "0") == "0":
        again = f"fewstep {shlex.join(arguments)}"
        if "TORCHELASTIC_RUN_ID" in os.environ:
            again = f"the same torchrun line, with -m {again}"
        print(f"\n{said or 'stopped; completed work is kept'}\nTo resume: {again}", file=sys.stderr)
    return INTERRUPTED


def _is_ours(error: BaseException) -> bool:
    """Return whether the message is meant for users: this package's errors, and the system's errors about files."""
    return isinstance(error, (UserError, OSError, ModuleNotFoundError)) or type(error) is ValueError
