"""`fewstep demo`: distil the shipped teacher into a few-step generator in a few minutes, with a table and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from fewstep.cli.options import COUNT, SAVING, Line, Processes, about, count_processes, several

__all__ = ["demo"]

TEACHER = "fashion-mnist"
MANY = 35  # calls of the teacher under EDM's own sampler
FEW = (9, 4, 1)  # calls of the teacher under the best sampler that is known for each
RECIPES = {4: "fashion-mnist/demo", 1: "fashion-mnist/demo-1step"}
LONGER = {4: "fashion-mnist/dmd2-4step", 1: "fashion-mnist/sid"}
METHODS = {4: "DMD2, four steps", 1: "SiD, one step"}
OTHER = {4: 1, 1: 4}
PLACES = {4: Path("runs/demo"), 1: Path("runs/demo-1step")}


def demo(
    steps: Annotated[Literal[4, 1], about("network calls of the generator: 4 by DMD2, or 1 by SiD")] = 4,
    out: Annotated[
        Path | None, about("run folder; the same folder resumes", "runs/demo or runs/demo-1step", "FOLDER")
    ] = None,
    images: Annotated[int | None, COUNT, about("length of the training in images", "the recipe's")] = None,
    samples: Annotated[int, COUNT, about("images per row of the final table")] = 2_000,
    processes: Processes = "auto",
    line: Line = (),
) -> int:
    """Distil the shipped Fashion-MNIST teacher in a few minutes, and show the result.

    The table has the teacher under its best samplers beside the student, and the other demo's student once that is trained.
    """
    from fewstep.system import distributed
    from fewstep.system.device import pick_device

    code = several(line, count_processes(processes, pick_device("auto").type == "cuda"), SAVING)
    if code is not None:
        return code
    with distributed.process_group():
        _distil_and_compare(steps, out or PLACES[steps], images, samples)
    return 0


def _distil_and_compare(steps: int, folder: Path, images: int | None, samples: int) -> None:
    """Distil the Fashion-MNIST teacher, score both, write the report."""
    from fewstep.evaluation.candidates import expand
    from fewstep.evaluation.compare import compare, footnotes, table_of
    from fewstep.report.page import write_report
    from fewstep.report.run_folder import RunFolder
    from fewstep.run.execute import execute
    from fewstep.run.settings import load_run
    from fewstep.run.specs import DistillRun
    from fewstep.system import distributed
    from fewstep.system.console import Progress, results, table
    from fewstep.teachers.samplers import Best

    run = load_run(RECIPES[steps])
    assert isinstance(run, DistillRun)
    if images is not None:
        run = run.model_copy(update={"train": run.train.model_copy(update={"images": images})})
    main = distributed.rank() == 0
    if main:
        results.print(f"Distilling the shipped Fashion-MNIST teacher by {METHODS[steps]} (no data needed).")
        results.print(
            f"Pictures appear in {folder / 'pictures'}. Press Ctrl-C to save and stop; run the same command to resume."
        )
    execute(run, folder)
    other = OTHER[steps]
    beside = folder == PLACES[steps] and PLACES[other].is_dir() and RunFolder(PLACES[other], "", 0).finished
    both = [folder, *([PLACES[other]] if beside else [])]
    candidates = [
        *expand([TEACHER], (MANY,)),
        *expand([TEACHER], FEW, solver=Best()),
        *expand([str(place) for place in both], ()),
    ]
    with Progress("compare", samples * len(candidates), enabled=main) as bar:

        def progress(name: str, done: int) -> None:
            bar.description = name
            bar.update(done)

        rows = compare(
            candidates,
            samples,
            folder / "results.json",
            bf16=run.train.bf16(),
            command="fewstep demo",
            progress=progress,
        )
    if main:
        results.print(table(f"{samples:,} samples each", *table_of(rows)))
        for text in footnotes(rows):
            results.print(text, markup=False, highlight=False, soft_wrap=True)
        page = write_report(both, folder / "report.html")
        results.print(f"Look at it:       {page.resolve()}")
        results.print(f"More samples:     fewstep sample {folder} --seeds 0-99 --classes sneaker,bag --out bags.png")
        results.print(f"The other demo:   fewstep demo --steps {other}    ({METHODS[other]})")
        results.print(f"A longer run:     fewstep distill {LONGER[steps]}")
