"""`fewstep plan` and `fewstep bench`: the cost of a run, predicted or measured."""

from __future__ import annotations

from typing import Annotated

from fewstep.cli.options import (
    COUNT,
    AsJson,
    DryRun,
    Imports,
    Line,
    Processes,
    Recipe,
    RunFolder,
    Settings,
    about,
    as_json,
    several,
)
from fewstep.cli.options import count_processes as count
from fewstep.cli.train import load, processes_of

__all__ = ["bench", "plan"]


def plan(
    recipe: Recipe = None,
    out: RunFolder = None,
    dry_run: DryRun = False,
    processes: Processes = "auto",
    imports: Imports = (),
    json: AsJson = False,
    settings: Settings = (),
) -> None:
    """Print the cost of a run without loading anything: memory by part, operations, messages, hours.

    Takes the options of `fewstep distill`, so you can plan its command line unchanged. Writes no file.
    """
    from fewstep.costs.describe import describe, facts
    from fewstep.costs.machines import published
    from fewstep.costs.plan import plan as plan_of
    from fewstep.run.recipes import find_recipe
    from fewstep.run.specs import DistillRun

    run = load(recipe, DistillRun, settings, processes, imports)
    assert recipe is not None  # by load
    if dry_run:
        print(describe(run))
        return
    found = plan_of(run, None if processes == "auto" else count(processes, False))
    paper = published(find_recipe(recipe).read_text(encoding="utf-8", errors="replace"))
    if json:
        as_json(facts(found))
        return
    print(found if paper is None else f"{found}\n{found.compared(paper)}")


def bench(
    recipe: Recipe = None,
    out: RunFolder = None,
    dry_run: DryRun = False,
    processes: Processes = "auto",
    cycles: Annotated[int, COUNT, about("number of update cycles to time")] = 3,
    imports: Imports = (),
    json: AsJson = False,
    settings: Settings = (),
    line: Line = (),
) -> int:
    """Measure the cost of a distillation: network passes, operations, memory, images per second.

    Takes the options of `fewstep distill`, so you can measure its command line unchanged. Writes no file.
    """
    from fewstep.costs.bench import measure
    from fewstep.costs.describe import describe
    from fewstep.run.specs import DistillRun
    from fewstep.system import distributed

    run = load(recipe, DistillRun, settings, processes, imports)
    if dry_run:
        print(describe(run))
        return 0
    code = several(line, processes_of(run, processes))
    if code is not None:
        return code
    with distributed.process_group():
        cost = measure(run, cycles)
        if distributed.rank() == 0:
            as_json(cost) if json else print(cost)
    return 0
