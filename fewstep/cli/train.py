"""`fewstep pretrain` and `fewstep distill`: train a run in its folder, or resume it there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fewstep.cli.options import (
    COUNT,
    PATH,
    SAVING,
    DryRun,
    Imports,
    Line,
    Processes,
    Recipe,
    RunFolder,
    Settings,
    about,
    count_processes,
    several,
)

if TYPE_CHECKING:
    from fewstep.run.pretraining import PretrainRun
    from fewstep.run.specs import DistillRun, R
    from fewstep.teachers import DiffusersTeacher

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
    prompts: Annotated[
        Path | None,
        PATH,
        about(
            "prompts of a text-to-image teacher: a file, which is encoded once, or a folder of `fewstep prepare`",
            "the run's",
        ),
    ] = None,
    steps: Annotated[int | None, COUNT, about("network calls of a pipeline's student", "4")] = None,
    lora: Annotated[bool, about("train adapters on a pipeline's network, not a copy of it", "")] = False,
    processes: Processes = "auto",
    imports: Imports = (),
    settings: Settings = (),
    line: Line = (),
) -> int:
    """Distil a teacher into a few-step generator.

    Any setting of the run can be changed: `--train.images 1000`. `fewstep distill RECIPE --help` lists them. In place of a
    recipe, the folder of a text-to-image pipeline: `fewstep distill my-sdxl --steps 4 --lora --prompts prompts.txt` encodes the
    prompts, prints the plan and trains.
    """
    from fewstep.run.own import with_prompts
    from fewstep.run.settings import find_pipeline
    from fewstep.run.specs import DistillRun

    pipeline = find_pipeline(recipe) if recipe is not None else None
    if pipeline is None:
        if steps is not None or lora:
            raise ValueError(
                f"--steps and --lora must come with a pipeline's folder, got {recipe}. Try: --generator.timesteps and "
                "--generator.lora.rank of the recipe"
            )
        run = load(recipe, DistillRun, settings, processes, imports)
    else:
        run = _of_pipeline(pipeline, steps, lora, settings, processes)
    assert recipe is not None  # by load
    folder = out or _place(recipe)
    if prompts is not None:
        first = not dry_run and "RANK" not in os.environ  # workers find what the first process encoded
        run = with_prompts(run, prompts, folder, encode=first)
    if pipeline is not None and not dry_run and "RANK" not in os.environ:
        from fewstep.costs.plan import plan

        print(plan(run, None))
    return _train(recipe, run, folder, dry_run, processes, line)


def _place(recipe: str) -> Path:
    """Run folder without `--out`; of a pipeline after its name."""
    from fewstep.run.recipes import run_place
    from fewstep.run.settings import find_pipeline

    return run_place(recipe) if find_pipeline(recipe) is None else Path("runs") / Path(recipe).resolve().stem


def _of_pipeline(
    pipeline: DiffusersTeacher, steps: int | None, lora: bool, settings: Settings, processes: str
) -> DistillRun:
    from fewstep.run.overriding import override
    from fewstep.run.own import pipeline_run

    count_processes(processes, False)
    run = pipeline_run(pipeline, 4 if steps is None else steps, lora)
    return override(run, settings) if settings else run


def _train(
    recipe: str | None, run: PretrainRun | DistillRun, out: Path | None, dry_run: bool, processes: str, line: Line
) -> int:
    from fewstep.costs.describe import describe
    from fewstep.report.ending import ending
    from fewstep.run.execute import execute
    from fewstep.system import distributed

    assert recipe is not None  # by load
    if dry_run:
        print(describe(run))
        return 0
    folder = out or _place(recipe)
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
    from fewstep.run.overriding import override
    from fewstep.run.recipes import list_recipes
    from fewstep.run.settings import load_run
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
