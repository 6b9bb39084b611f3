"""`fewstep demo`: the shipped teacher becomes a one-step generator in a few minutes, with a table and a page at the
end."""

from __future__ import annotations

from pathlib import Path

from fewstep.evaluation.candidates import expand
from fewstep.evaluation.compare import compare, footnotes, table_of
from fewstep.report.page import write_report
from fewstep.run.execute import execute
from fewstep.run.settings import load_run
from fewstep.run.specs import DistillRun
from fewstep.system import distributed
from fewstep.system.console import Progress, results, table

__all__ = ["demo"]

TEACHER_CALLS = (35, 9, 5)


def demo(folder: Path, images: int | None = None, samples: int = 2_000) -> Path:
    """Distil the Fashion-MNIST teacher by SiD, compare both, write the report; a second call goes on where it stopped.

    Args:
        folder: run folder.
        images: length of the training; None is the recipe's.
        samples: images of each row of the final table.

    Returns:
        The HTML page.
    """
    if samples < 1 or (images is not None and images < 1):
        raise ValueError(f"samples and images must be at least 1, got {samples} and {images}. Try: leave them out")
    run = load_run("fashion-mnist/demo")
    assert isinstance(run, DistillRun)
    if images is not None:
        run = run.model_copy(update={"train": run.train.model_copy(update={"images": images})})
    main = distributed.rank() == 0
    if main:
        results.print(
            "Distilling the shipped Fashion-MNIST teacher into a generator of one network call, by SiD (no data "
            "needed)."
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
    page = folder / "report.html"
    if main:
        results.print(table(f"{samples:,} samples each", *table_of(rows)))
        for line in footnotes(rows):
            results.print(line, markup=False, highlight=False, soft_wrap=True)
        write_report([folder], page)
        results.print(f"Look at it:       {page.resolve()}")
        results.print(f"More samples:     fewstep sample {folder} --seeds 0-99 --classes sneaker,bag --out bags.png")
        results.print("A longer run:     fewstep distill fashion-mnist/sid")
    return page
