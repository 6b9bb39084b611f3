"""`fewstep pretrain` and `fewstep distill`: train a run in its folder, or resume it there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.cli.options import (
    SAVING,
    DryRun,
    Imports,
    Line,
    Processes,
    Recipe,
    RunFolder,
    Settings,
    count_processes,
    several,
)

if TYPE_CHECKING:
    from fewstep.run.pretraining import PretrainRun
    from fewstep.run.specs import DistillRun, R

__all__ = ["distill", "load", "pretrain", "processes_of"]


def pretrain(
    recipe: Recipe = None,
    out: RunFolder = None,
    dry_run: DryRun = False,
    processes: Processes = "auto",
    imports: Imports = (),
    settings: Settings = (),
    line: Line = (),
) -> int:
    """Train a teacher.

    Any setting of the run can be changed: `--train.images 1000`. `fewstep pretrain RECIPE --help` lists them.
    """
    from fewstep.run.pretraining import PretrainRun

    return _train(recipe, load(recipe, PretrainRun, settings, processes, imports), out, dry_run, processes, line)


def distill(
    recipe: Recipe = None,
    out: RunFolder = None,
    dry_run: DryRun = False,
    processes: Processes = "auto",
    imports: Imports = (),
    settings: Settings = (),
    line: Line = (),
) -> int:
    """Distil a teacher into a few-step generator.

    Any setting of the run can be changed: `--train.images 1000`. `fewstep distill RECIPE --help` lists them.
    """
    from fewstep.run.specs import DistillRun

    return _train(recipe, load(recipe, DistillRun, settings, processes, imports), out, dry_run, processes, line)


def _train(
    recipe: str | None, run: PretrainRun | DistillRun, out: Path | None, dry_run: bool, processes: str, line: Line
) -> int:
    from fewstep.costs.describe import describe
    from fewstep.report.ending import ending
    from fewstep.run.execute import execute
    from fewstep.run.recipes import run_place
    from fewstep.system import distributed

    assert recipe is not None  # by load
    if dry_run:
        print(describe(run))
        return 0
    folder = out or run_place(recipe)
    code = several(line, processes_of(run, processes), SAVING)
    if code is not None:
        return code
    with distributed.process_group():
        execute(run, folder)
        if distributed.rank() == 0:
            print(ending(folder))
    return 0


def load(recipe: str | None, kind: type[R], settings: Settings, processes: str, imports: Imports = ()) -> R:
    """Read a run and apply the settings of the command line.

    Raises:
        SettingsError: no recipe, one of another kind, or an invalid setting.
        ValueError: invalid `processes`.
    """
    from fewstep.run.recipes import list_recipes
    from fewstep.run.settings import load_run, override
    from fewstep.system.errors import SettingsError

    if recipe is None:
        raise SettingsError(f"RECIPE must be given. Try: a run file, or one of {', '.join(list_recipes())}")
    run = load_run(recipe, imports or None)
    count_processes(processes, False)  # validate before loading anything, also in a dry run
    if not isinstance(run, kind):
        raise SettingsError(f"{recipe} is a {run.kind} run. Try: `fewstep {run.kind}`")
    return override(run, settings) if settings else run


def processes_of(run: PretrainRun | DistillRun, wanted: str) -> int:
    """Number of processes of a run; `auto` is the largest that fits the machine and divides the batch."""
    count = count_processes(wanted, run.train.torch_device().type == "cuda")
    while wanted == "auto" and run.train.batch_size % (count * (run.train.micro_batch or 1)):
        count -= 1
    return count
