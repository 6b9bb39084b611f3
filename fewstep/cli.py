"""The `fewstep` command: arguments to calls, errors to one line. No logic of its own; imports what a command needs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for what the user can mend, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="fewstep", description="Distil diffusion models into generators of one to four network calls.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (add, _) in COMMANDS.items():
        add(commands.add_parser(name, help=add.__doc__, description=add.__doc__, add_help=name not in ("pretrain", "distill")))
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("pretrain", "distill"):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        return COMMANDS[options.command][1](options, rest, arguments) or 0
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{stop or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if not _is_ours(error):
            raise
        print(f"fewstep {options.command}: {error}", file=sys.stderr)
        return 1


def _is_ours(error: BaseException) -> bool:
    """Whether the message was written for users: every error class of this package, and what the system says of files."""
    return type(error).__module__.startswith("fewstep") or isinstance(error, (OSError, ModuleNotFoundError)) or type(error) is ValueError


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a run file, a run folder, or the name of a shipped recipe")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/<recipe>); the same folder goes on")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run and its cost, train nothing")
    parser.add_argument("--processes", default="auto", help="processes on this machine; auto: one a core without a GPU")
    parser.add_argument("-h", "--help", action="store_true", help="show this, and every setting that can be overridden")


def _add_pretrain(parser: argparse.ArgumentParser) -> None:
    """train a teacher"""
    _run_options(parser)


def _add_distill(parser: argparse.ArgumentParser) -> None:
    """distil a teacher into a few-step generator"""
    _run_options(parser)


def _train(options: argparse.Namespace, rest: list[str], arguments: list[str]) -> int:
    import tyro

    from fewstep import distributed, run as runs

    kind = runs.PretrainRun if options.command == "pretrain" else runs.DistillRun
    if options.recipe is None:
        if options.help:
            print(f"usage: fewstep {options.command} RECIPE [--out FOLDER] [--dry-run] [--processes N] [--SETTING VALUE ...]\n")
            print("Recipes: " + ", ".join(runs.list_recipes()) + f"\nSettings of a recipe: fewstep {options.command} RECIPE --help")
            return 0
        raise runs.RunError(f"which run? give a file or a recipe's name: {', '.join(runs.list_recipes())}")
    run: Any = runs.load_run(options.recipe)
    if not isinstance(run, kind):
        raise runs.RunError(f"{options.recipe} is a {run.kind} run: use `fewstep {run.kind}`")
    if rest or options.help:
        run = runs.override(run, rest + (["--help"] if options.help else []))
    out = options.out or Path("runs") / runs.run_name(options.recipe)
    if options.dry_run:
        print(runs.describe(run))
        return 0
    processes = _processes(options.processes, run)
    if processes > 1 and "RANK" not in os.environ:
        from fewstep.launch import relaunch

        return relaunch(arguments, processes)
    with distributed.process_group():
        runs.execute(run, out)
    return 0


def _processes(wanted: str, run: Any) -> int:
    from fewstep.launch import default_processes
    from fewstep.run import RunError

    if wanted != "auto":
        if not wanted.isdigit() or int(wanted) < 1:
            raise RunError(f"--processes {wanted}: give a number, or auto")
        return int(wanted)
    count = default_processes(run.train.torch_device().type == "cuda")
    while run.train.batch_size % count:
        count -= 1
    return count


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[..., int | None]]] = {
    "pretrain": (_add_pretrain, _train),
    "distill": (_add_distill, _train),
}
