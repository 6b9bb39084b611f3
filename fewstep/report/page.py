"""One self-contained HTML page about one run or several: numbers, curves, samples, settings.

Reads the files of run folders, also of a running run. Loads no network and does not import torch, so it takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import cache
from pathlib import Path

import jinja2

import fewstep
from fewstep.report.charts import duration, short
from fewstep.report.curves import curve_note, curves, diagnostics
from fewstep.report.pictures import side_by_side
from fewstep.report.run_folder import RunFolder
from fewstep.report.tables import differences, evaluations, join, labels, results
from fewstep.system.errors import FileError
from fewstep.system.files import atomic_write

__all__ = ["write_report"]


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write one self-contained HTML page about run folders; several are compared in the same figures.

    The page says in words what a young run does not have yet.

    Args:
        folders: run folders of `fewstep distill` or `fewstep pretrain`.
        out: output file.

    Returns:
        `out`.

    Raises:
        FileError: no folder given, one that is empty or not a run folder, or `out` is a folder.
        WriteError: the page cannot be written.
    """
    out = Path(out)
    if not folders:
        raise FileError("at least one run folder must be given, got none. Try: `fewstep report runs/demo`")
    if out.is_dir():
        raise FileError(f"`--out` must be a file, got the folder {out}. Try: {out / 'report.html'}")
    unique = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    runs = [
        RunFolder(folder, label, look) for look, (folder, label) in enumerate(zip(unique, labels(unique), strict=True))
    ]
    charts = curves(runs)
    page = _template().render(
        runs=runs,
        one=runs[0] if len(runs) == 1 else None,
        title=runs[0].title if len(runs) == 1 else f"{len(runs)} runs compared",
        results=results(runs),
        curves=charts,
        references=any(chart.lines for chart in charts),
        curve_note=curve_note(runs),
        distilled=any(not run.pretraining for run in runs),
        evaluations=evaluations(runs),
        side_by_side=side_by_side(runs),
        diagnostics=diagnostics(runs),
        differences=differences(runs),
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        version=fewstep.__version__,
        duration=duration,
        short=short,
        join=join,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, page.encode(errors="replace"))  # halves of characters, which JSON may hold, have no UTF-8
    return out


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("fewstep", "assets")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2")
