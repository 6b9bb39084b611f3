"""One self-contained HTML page about one run, or about several beside each other: numbers, curves, samples, settings.

Reads the files of run folders. Loads no network and does not import torch, so that a page is there in seconds, also
while the run goes on.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageDraw

import fewstep
from fewstep.evaluation.metrics import IDENTITY, MEASURES, Column, best, columns_of, notes_of, number, text_of
from fewstep.report.charts import Chart, Series, duration, short
from fewstep.report.run_folder import ReportError, RunFolder, is_teacher, teacher_row

__all__ = ["ReportError", "fid_curves", "write_report"]

COLUMNS, GAP = 10, 4  # how `Distillation.picture` lays its grids out: square images in ten columns, four pixels between
PANEL_ROWS = ("x", *(f"{row} {ratio}" for ratio in (0.3, 1, 3) for row in ("noised", "D_real", "D_fake")))
PICTURE_BYTES = 1_600_000  # of all pictures together; a third more as text
USUAL_SAMPLES = 50_000  # what published FIDs are measured with


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write one HTML page, complete in itself, about run folders; several are compared in the same figures.

    Whatever a young run does not have yet is said in words on the page.

    Args:
        folders: run folders of `fewstep distill` or `fewstep pretrain`.
        out: the page.

    Returns:
        `out`.

    Raises:
        ReportError: no folder given, one that is no run folder or has nothing in it, or `out` is a folder.
        OSError: the page cannot be written.
    """
    out = Path(out)
    if not folders:
        raise ReportError("no run folder given: name at least one, such as `fewstep report runs/demo`")
    if out.is_dir():
        raise ReportError(f"{out} is a folder: name a file for the page, such as {out / 'report.html'}")
    unique = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    runs = [
        RunFolder(folder, label, look) for look, (folder, label) in enumerate(zip(unique, _labels(unique), strict=True))
    ]
    curves = _curves(runs)
    page = _template().render(
        runs=runs,
        one=runs[0] if len(runs) == 1 else None,
        title=runs[0].title if len(runs) == 1 else f"{len(runs)} runs compared",
        results=_results(runs),
        curves=curves,
        references=any(chart.lines for chart in curves),
        curve_note=_curve_note(runs),
        distilled=any(not run.pretraining for run in runs),
        evaluations=_evaluations(runs),
        side_by_side=_side_by_side(runs),
        diagnostics=_diagnostics(runs),
        differences=_differences(runs),
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        version=fewstep.__version__,
        duration=duration,
        short=short,
        join=_join,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.tmp")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, out)
    return out


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("fewstep", "assets")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2")


@dataclass(frozen=True)
class _Picture:
    """An image of the page; `rows` names its rows."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str
    rows: tuple[str, ...] = ()


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(parts[-length:]) for parts in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


# -- tables ------------------------------------------------------------------------------------------------------------


def _results(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """The results table: rows of final evaluations, and the last numbers of runs that have none."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    about = []
    for run in runs:
        found = run.rows
        for row in found:
            owner = next((other for other in runs if not is_teacher(row) and other.owns(row)), None)
            stale = owner is None and any(row.get("name") == other.folder.resolve().name for other in runs)
            note = owner.method if owner else "weights of an earlier time" if stale else ""
            name = owner.label if owner and row.get("sha256") else row.get("name") or "unnamed"
            key = (row.get("sha256") or row.get("name"), *(json.dumps(row.get(entry)) for entry in IDENTITY))
            rows.setdefault(key, row | {"name": name, "note": note})
            made = [row.get("hardware"), row.get("date"), f"seeds {row['seeds']}" if row.get("seeds") else None]
            about.append((str(row.get("command") or ""), ", ".join(str(part) for part in made if part)))
        scored = [line for line in run.lines("evaluation") if number(line.get("fid")) is not None]
        if scored and not any(run.owns(row) for row in found if run.pretraining or not is_teacher(row)):
            note = f"{run.method}, during training, at {scored[-1]['images']:,} images"
            rows[run.label, "so far"] = scored[-1] | {"name": run.label, "note": note}
    listed = sorted(rows.values(), key=lambda row: (not is_teacher(row), -(number(row.get("calls")) or 0)))
    shown = columns_of(listed)
    # what a row was measured with: one footnote for each combination, and for each set of warnings
    kinds = list(dict.fromkeys(kind for row in listed if any(kind := _kind(row))))
    marks = {kind: _mark(index) for index, kind in enumerate(kinds)}
    samples = {_kind(row): row for row in listed}
    for row in listed:
        row["teacher"] = is_teacher(row)
        row["mark"] = marks.get(_kind(row), "")
        row["cells"] = [_cell(row, column, listed) for column in shown]
        row["calls_text"] = f"{row['calls']:,}" if isinstance(row.get("calls"), int) else "–"
        row["n_text"] = f"{row['n']:,}" if isinstance(row.get("n"), int) else "–"
    bold = [column for index, column in enumerate(shown) if any(row["cells"][index]["best"] for row in listed)]
    return {
        "rows": listed,
        "marked": [f"{column.title} ({column.better} is better)" for column in bold],
        "headers": [column.title for column in shown],
        "protocols": [_protocol(marks[kind], samples[kind]) for kind in kinds],
        "alike": len({kind[0] for kind in map(_kind, listed)}) < 2,
        "about": list(dict.fromkeys(about)),
        "missing": [run for run in runs if not run.rows],
    }


def _kind(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Everything that a row's numbers were measured with, and the warnings about them."""
    under = dict.fromkeys(str(row[column.under]) for column in columns_of([row]) if row.get(column.under))
    return "; ".join(under), tuple(notes_of(row))


def _mark(index: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    return (_mark(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def _cell(row: Mapping[str, Any], column: Column, rivals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"text": text_of(row, column) or "–", "best": best(row, rivals, column)}


def _protocol(mark: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A footnote: the id, and what a reader must know to trust numbers under it."""
    notes, (protocol, warnings) = [], _kind(row)
    if isinstance(row.get("n"), int) and row["n"] < USUAL_SAMPLES:
        few = f"{row['n']:,} samples, fewer than the {USUAL_SAMPLES:,} of published FIDs"
        notes.append(f"{few}: FID reads the higher, the fewer there are.")
    if "inception" not in protocol:
        notes.append("Not Inception's features: these numbers compare with each other, not with published ones.")
    return {"mark": mark, "id": protocol, "notes": notes, "warnings": warnings}


def _evaluations(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """The evaluations made during training, as a table for each run."""
    tables = []
    measured = {column.key for column in MEASURES}
    for run in runs:
        lines = [line for line in run.lines("evaluation") if line.keys() & measured]
        columns = columns_of(lines)
        rows = []
        for line in lines:
            seconds = _seconds_at(run, line["images"])
            cells = [text_of(line, column) or "–" for column in columns]
            rows.append([f"{line['images']:,}", duration(seconds) if seconds is not None else "–", *cells])
        if rows:
            notes = list(dict.fromkeys(note for line in lines for note in notes_of(line)))
            headers = [column.title for column in columns]
            tables.append({"run": run, "headers": headers, "rows": rows, "notes": notes})
    return tables


def _differences(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Settings in which the runs differ: one row each, a cell for each run."""
    flat = [_flat(run.settings) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [[key, *(settings.get(key, "–") for settings in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(value: Any, where: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in _flat(part, f"{where}.{key}".lstrip(".")).items()}
    return {where: json.dumps(value, default=str)} if where else {}


# -- charts ------------------------------------------------------------------------------------------------------------


def fid_curves(folders: Sequence[Path]) -> list[Chart]:
    """FID over images seen and over training time of several runs, as charts to draw elsewhere.

    Raises:
        ReportError: one is no run folder.
    """
    return _curves([RunFolder(folder, folder.name, look) for look, folder in enumerate(folders)])


def _curves(runs: Sequence[RunFolder]) -> list[Chart]:
    """FID over images and over training time, all runs in one figure."""
    references = {}
    for run in runs:
        row = teacher_row(run.rows)
        if row is not None and row["fid"] > 0:
            references[str(row.get("name")), row["fid"]] = (f"teacher ({row.get('calls', '?')} calls)", row["fid"])
    positive = [(run, [(x, y) for x, y in run.fid if x > 0 and y > 0]) for run in runs]
    clocked = [(run, [(s, y) for x, y in points if (s := _seconds_at(run, x))]) for run, points in positive]
    charts = []
    for title, found, time in (("FID and images seen", positive, False), ("FID and training time", clocked, True)):
        series = [Series(run.label, points, run.look) for run, points in found if points]
        if series:
            how = (
                "Training alone: the time of evaluations and pictures is left out."
                if time
                else "Healthy: a straight fall on these logarithmic scales; where it bends flat, more images buy little."
            )
            charts.append(Chart(title, how, series, wide=True, time=time, lines=list(references.values())))
    return charts


def _curve_note(runs: Sequence[RunFolder]) -> str:
    """What the points of the curves were measured with, and what has no place on a log axis: the start."""
    scored = [line for run in runs for line in run.lines("evaluation") if number(line.get("fid")) is not None]
    sizes = sorted({line["n"] for line in scored if isinstance(line.get("n"), int)})
    notes = [f"Each point: {' or '.join(f'{n:,}' for n in sizes)} samples of the averaged weights."] if sizes else []
    names = {run.label: f"{run.label} " if len(runs) > 1 else "" for run in runs}
    starts = [f"{names[run.label]}{run.fid[0][1]:.2f}" for run in runs if run.fid and run.fid[0][0] == 0]
    if starts:
        notes.append(f"Before training: {', '.join(starts)}.")
    teachers = [row for run in runs if (row := teacher_row(run.rows))]
    if len({line.get("protocol") for line in [*scored, *teachers]}) > 1:
        notes.append("Not all of these numbers were measured alike: FID reads the higher, the fewer samples there are.")
    return " ".join(notes)


def _seconds_at(run: RunFolder, images: float) -> float | None:
    """Training time until `images` were seen; None if the clock has not come that far."""
    if not run.clock or images > run.clock[-1][0]:
        return None
    return float(np.interp(images, [0, *(x for x, _ in run.clock)], [0.0, *(seconds for _, seconds in run.clock)]))


@dataclass(frozen=True)
class _Diagnostic:
    """One chart of the small multiples: `keys` are logged numbers and their names, or what their keys start with."""

    title: str
    how: str
    keys: dict[str, str] | str
    fold: str = ""


_GAPS = {"gap_real": "|x − D_real|", "gap_fake": "|x − D_fake|", "gap_scores": "|D_real − D_fake|"}
_LEVELS = "By noise level"
_OTHERS = "Other logged numbers"
_DIAGNOSTICS = [
    _Diagnostic(
        "Distances",
        "Healthy: fake at or below real (the critic keeps up with the samples), and the two scores drawing closer.",
        _GAPS,
    ),
    *(
        _Diagnostic(f"Distances, {where}", how, {f"{key}/{level}": name for key, name in _GAPS.items()}, _LEVELS)
        for level, where, how in (
            ("t0.00", "t 0 to ¼", "Hardly any noise: fine detail. A fake far above real means blurred detail."),
            ("t0.25", "t ¼ to ½", "Little noise: texture and edges, still to be learnt while the scores differ here."),
            ("t0.50", "t ½ to ¾", "Much noise: shapes. If the scores stay apart here, shapes are wrong or missing."),
            ("t0.75", "t ¾ to 1", "Mostly noise: only an average is left to see, so real and fake nearly coincide."),
        )
    ),
    _Diagnostic(
        "Gradient norm on x, by term",
        "Healthy: steady or slowly falling; of several terms, none above thirty times another.",
        "x_gradient/",
    ),
    _Diagnostic(
        "Gradient norm of the networks",
        "Before clipping. Healthy: steady. A rise by ten times comes before divergence: lower that learning rate.",
        "gradient_norm",
    ),
    _Diagnostic(
        "Discriminator logits",
        "Above 0 means “looks real”. Healthy: real a little above generated. An ever wider margin is saturation.",
        {"logit_real": "real images", "logit_fake": "generated", "logit_generator": "generated, generator's turn"},
    ),
    _Diagnostic(
        "Discriminator accuracy",
        "0.5 is guessing. Healthy: below about 0.9; both near 1 leave the generator nothing to learn from.",
        {"accuracy_real": "real images", "accuracy_fake": "generated"},
    ),
    _Diagnostic(
        "Spread of x",
        "Standard deviation over a batch. Healthy: steady; a lasting fall is collapse, a lasting rise drift.",
        {"x_spread": ""},
    ),
    _Diagnostic(
        "Mean of x",
        "Mean over a batch and all pixels. Healthy: steady; a slow walk away from its first value is drift.",
        {"x_mean": ""},
    ),
    _Diagnostic(
        "Regression on pairs",
        "Perceptual distance from the teacher's own images. Healthy: falling.",
        {"regression_distance": ""},
    ),
    _Diagnostic(
        "Denoising loss", "Healthy: falling, then flat. A jump that stays: too high a learning rate.", {"loss": ""}
    ),
    _Diagnostic(
        "Losses",
        "Watch for jumps only: the value of a generator's loss says nothing about its samples.",
        "loss/",
        _OTHERS,
    ),
]


def _diagnostics(runs: Sequence[RunFolder]) -> dict[str, list[Chart]]:
    """Small multiples by fold ("" is open): of one run several numbers in a chart, of several runs one number."""
    unknown = [key for run in runs for line in run.lines("train") for key in line if key not in ("images", "kind")]
    unknown = list(dict.fromkeys(unknown))
    folds: dict[str, list[Chart]] = {}

    def add(what: _Diagnostic, keys: Mapping[str, str]) -> None:
        if len(runs) == 1:
            lines = [Series(name, runs[0].points(key), look) for look, (key, name) in enumerate(keys.items())]
            charts = [Chart(what.title, what.how, lines)]
        else:
            charts = []
            for key, name in keys.items():
                lines = [Series(run.label, run.points(key), run.look) for run in runs]
                charts.append(Chart(f"{what.title}: {name}".removesuffix(": "), what.how, lines))
        for chart in charts:
            chart.series = [line for line in chart.series if any(math.isfinite(y) for _, y in line.points)]
        fold = "" if what.fold == _LEVELS and len(runs) == 1 else what.fold
        folds.setdefault(fold, []).extend(chart for chart in charts if chart.series)

    for what in _DIAGNOSTICS:
        keys = what.keys
        if isinstance(keys, str):
            keys = {key: key.removeprefix(keys).strip("/") for key in unknown if key.startswith(keys)}
        add(what, keys)
        unknown = [key for key in unknown if key not in keys]
    for key in unknown:
        add(_Diagnostic(key, "Logged by the objective.", {}, _OTHERS), {key: ""})
    return {fold: charts for fold, charts in folds.items() if charts}


# -- pictures ----------------------------------------------------------------------------------------------------------


def _side_by_side(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """All pictures of the page: of each run, and of several runs in rows under each other."""
    most = PICTURE_BYTES // (4 * len(runs) + (len(runs) > 1))
    teachers = {r.teacher_grid.tobytes(): (r.label, r.teacher_grid) for r in runs if r.teacher_grid is not None}
    together = [("teacher" if len(teachers) == 1 else f"teacher of {who}", grid) for who, grid in teachers.values()]
    together += [(run.label, run.student_grid[1]) for run in runs if run.student_grid is not None]
    rows = None
    if len(runs) > 1 and len(together) > 1:
        alt = "One row of ten samples for each run and its teacher, from the same noise and labels"
        rows = _strips(together, alt, "Each column starts from the same noise and label.", most)
    return {"rows": rows, "runs": {run.label: _pictures(run, most) for run in runs}}


def _pictures(run: RunFolder, most: int) -> dict[str, _Picture | None]:
    classes = run.card.get("class_names") or ()
    columns = f" Columns: {', '.join(map(str, classes[:COLUMNS]))}." if len(classes) >= COLUMNS else ""
    made: dict[str, _Picture | None] = dict.fromkeys(("teacher", "student", "development", "panel"))
    if run.teacher_grid is not None:
        caption = f"The teacher, 35 network calls an image.{columns}"
        made["teacher"] = _picture(run.teacher_grid, "Grid of the teacher's samples", caption, most)
    if run.student_grid is not None:
        images, grid = run.student_grid
        calls = f", {run.calls} network call{'s' if run.calls != 1 else ''} an image" if run.calls else ""
        who = "The model" if run.pretraining else "The student"
        caption = f"{who} at {images:,} images{calls}.{columns if run.pretraining or run.teacher_grid is None else ''}"
        made["student"] = _picture(grid, f"Grid of samples at {images:,} images", caption, most)
    drawn = run.drawn("samples" if run.pretraining else "student")
    indices = sorted({0, *(2**k for k in range(20)), len(drawn) - 1})
    chosen = [drawn[index] for index in indices if 0 <= index < len(drawn)]
    strips = [(short(images), picture) for images, path in chosen if (picture := run.open(path)) is not None]
    if len(strips) > 1:
        if run.teacher_grid is not None:
            strips.append(("teacher", run.teacher_grid))
        alt = f"Ten samples from the same noise and labels, after {', '.join(label for label, _ in strips)} images"
        made["development"] = _strips(strips, alt, "Images seen, and the same ten seeds after them.", most)
    for images, path in reversed(run.drawn("panel")):
        picture = run.open(path)
        if picture is not None:
            alt = "Ten samples, and at three noise levels their noised version with both networks' predictions"
            fits = round((picture.height - GAP) / _step(picture)) == len(PANEL_ROWS)
            made["panel"] = _picture(picture, alt, f"At {images:,} images.", most, PANEL_ROWS if fits else ())
            break
    return made


def _step(grid: Image.Image) -> int:
    """Pixels from one row or column of a grid to the next."""
    return max(1, (grid.width - GAP) // COLUMNS)


def _strips(named: Sequence[tuple[str, Image.Image]], alt: str, caption: str, most: int) -> _Picture:
    """The first rows of grids under each other; grids of another width than the last are left out."""
    width = named[-1][1].width
    step = _step(named[-1][1])
    kept = [(name, grid) for name, grid in named if grid.width == width and grid.height >= step + GAP]
    mode = "L" if all(grid.mode == "L" for _, grid in kept) else "RGB"
    sheet = Image.new(mode, (width, step * len(kept) + GAP), "white")
    for row, (_, grid) in enumerate(kept):
        sheet.paste(grid.crop((0, 0, width, step + GAP)), (0, row * step))
    return _picture(sheet, alt, caption, most, tuple(name for name, _ in kept))


def _picture(grid: Image.Image, alt: str, caption: str, most: int, rows: tuple[str, ...] = ()) -> _Picture:
    """A grid as part of the page, in at most about `most` bytes."""
    data, kind = _encoded(_without_gaps(grid), most)
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return _Picture(uri, grid.width, grid.height, alt, caption, rows)


def _without_gaps(grid: Image.Image) -> Image.Image:
    """The white lines between the images made transparent, for dark pages; as it is if there are no such lines."""
    step, mask = _step(grid), Image.new("L", grid.size, 255)
    if step <= GAP or (grid.width - GAP) % step:
        return grid
    boxes = [(x, 0, x + GAP, grid.height) for x in range(0, grid.width, step)]
    boxes += [(0, y, grid.width, min(y + GAP, grid.height)) for y in range(0, grid.height, step)]
    if any(grid.crop(box).convert("L").getextrema() != (255, 255) for box in boxes):
        return grid
    draw = ImageDraw.Draw(mask)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, right - 1, bottom - 1), fill=0)
    clear = grid.copy()
    clear.putalpha(mask)
    return clear


def _encoded(picture: Image.Image, most: int) -> tuple[bytes, str]:
    """PNG if that is small enough, else WebP, in the end at a smaller size."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    if file.tell() <= most:
        return file.getvalue(), "png"
    full, width = picture.convert("RGBA"), min(1600, picture.width)
    for _ in range(4):
        height = max(1, round(full.height * width / full.width))
        file = io.BytesIO()
        full.resize((width, height), Image.Resampling.LANCZOS).save(file, "WEBP", quality=80)
        if file.tell() <= most:
            break
        width = max(300, int(0.9 * width * math.sqrt(most / file.tell())))
    return file.getvalue(), "webp"


def _join(values: Any) -> str:
    return ", ".join(f"{value:g}" if number(value) is not None else str(value) for value in values)
