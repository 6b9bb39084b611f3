"""`fewstep demo`: distil the shipped teacher into a one-step generator in a few minutes, with a table and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fewstep.cli.options import COUNT, SAVING, Line, Processes, about, count_processes, several

__all__ = ["demo"]

TEACHER_CALLS = (35, 9, 5)


def demo(
    out: Annotated[Path, about("run folder; the same folder resumes", metavar="FOLDER")] = Path("runs/demo"),
    images: Annotated[int | None, COUNT, about("length of the training in images", "the recipe's")] = None,
    samples: Annotated[int, COUNT, about("images per row of the final table")] = 2_000,
    processes: Processes = "auto",
    line: Line = (),
) -> int:
    """Distil the shipped Fashion-MNIST teacher in a few minutes, and show the result."""
    from fewstep.system import distributed
    from fewstep.system.device import pick_device

    code = several(line, count_processes(processes, pick_device("auto").type == "cuda"), SAVING)
    if code is not None:
        return code
    with distributed.process_group():
        _distil_and_compare(out, images, samples)
    return 0


def _distil_and_compare(folder: Path, images: int | None, samples: int) -> None:
    """Distil the Fashion-MNIST teacher by SiD, score both, write the report."""
    from fewstep.evaluation.candidates import expand
    from fewstep.evaluation.compare import compare, footnotes, table_of
    from fewstep.report.page import write_report
    from fewstep.run.execute import execute
    from fewstep.run.settings import load_run
    from fewstep.run.specs import DistillRun
    from fewstep.system import distributed
    from fewstep.system.console import Progress, results, table

    run = load_run("fashion-mnist/demo")
    assert isinstance(run, DistillRun)
    if images is not None:
        run = run.model_copy(update={"train": run.train.model_copy(update={"images": images})})
    main = distributed.rank() == 0
    if main:
        results.print(
            "Distilling the shipped Fashion-MNIST teacher into a one-step generator with SiD (no data needed)."
        )
        results.print(
            f"Pictures appear in {folder / 'pictures'}. Press Ctrl-C to save and stop; run the same command to resume."
        )
    execute(run, folder)
    candidates = expand([str(folder)], TEACHER_CALLS)
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
        page = write_report([folder], folder / "report.html")
        results.print(f"Look at it:       {page.resolve()}")
        results.print(f"More samples:     fewstep sample {folder} --seeds 0-99 --classes sneaker,bag --out bags.png")
        results.print("A longer run:     fewstep distill fashion-mnist/sid")
