"""One self-contained HTML page about one run, or about several beside each other: numbers, curves, samples, settings.

Reads the files of run folders and draws its own SVG charts (they follow the reader's light or dark scheme). Loads no
network and does not import torch, so that a page is there in a second, also while the run goes on.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image, ImageDraw

import fewstep
from fewstep.tracking import read_stats

__all__ = ["ReportError", "write_report"]

COLUMNS, GAP = 10, 4  # how `Distillation.picture` lays its grids out: square images in ten columns, four pixels between
PANEL_ROWS = ("x", *(f"{row} {ratio}" for ratio in (0.3, 1, 3) for row in ("noised", "D_real", "D_fake")))
PICTURE_BYTES = 1_600_000  # of all pictures together; a third more as text
USUAL_SAMPLES = 50_000  # what published FIDs are measured with


class ReportError(ValueError):
    """A folder that cannot be reported on, or a page that cannot be written there."""


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
    runs = [_Run(folder, label, look) for look, (folder, label) in enumerate(zip(unique, _labels(unique), strict=True))]
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
        duration=_duration,
        short=_short,
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


# -- what a run folder holds -------------------------------------------------------------------------------------------


class _Run:
    """One run folder. What is absent is empty here; what cannot be read is empty and named in `problems`."""

    def __init__(self, folder: Path, label: str, look: int) -> None:
        self.folder, self.label, self.look = folder, label, look
        self.problems: list[str] = []
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise ReportError(f"{folder} {what}: name a run folder, such as runs/demo")
        if not any(folder.iterdir()):
            raise ReportError(f"{folder} is empty: start a run in it first (`fewstep distill RECIPE --out {folder}`)")
        if not any((folder / name).exists() for name in ("run.yaml", "stats.jsonl", "results.json")):
            raise ReportError(
                f"{folder} is not a run folder (no run.yaml, stats.jsonl or results.json in it): name the folder that "
                "was --out of `fewstep distill` or `fewstep pretrain`"
            )
        self.settings_text = self._read("run.yaml", lambda path: path.read_text(encoding="utf-8"), "")
        self.settings = self._read("run.yaml", lambda path: yaml.safe_load(path.read_text(encoding="utf-8")), {})
        self.stats = self._read("stats.jsonl", read_stats, [])
        self.times = self._read("times.jsonl", read_stats, [])
        self.results = self._read("results.json", _json, {})
        self.pretraining = self.get("kind") == "pretrain"
        file = folder / f"{'teacher' if self.pretraining else 'student'}.safetensors"
        self.file = file if file.exists() else None
        self.header = self._read(f"{file.stem}.json", _json, {})
        self.problems = list(dict.fromkeys(self.problems))

    def _read(self, name: str, read: Callable[[Path], Any], absent: Any) -> Any:
        path = self.folder / name
        if not path.exists():
            return absent
        try:
            value = read(path)
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.problems.append(f"{name} cannot be read and is left out: {error}")
            return absent
        if not isinstance(value, type(absent)):
            self.problems.append(
                f"{name} is left out: it holds a {type(value).__name__}, not a {type(absent).__name__}"
            )
            return absent
        return value

    def get(self, *keys: str) -> Any:
        """A setting; None if it or what it is in is absent."""
        return _get(self.settings, *keys)

    @cached_property
    def card(self) -> dict[str, Any]:
        return _get(self.header, "metadata", "card") or {}

    @cached_property
    def _kinds(self) -> dict[str, list[dict[str, Any]]]:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for line in self.stats:
            kinds.setdefault(str(line.get("kind")), []).append(line)
        return kinds

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Lines of stats.jsonl: train, evaluation or warning."""
        return self._kinds.get(kind, [])

    def points(self, key: str, kind: str = "train") -> list[tuple[float, float]]:
        """(images, value) of a logged number; one that is not finite is nan."""
        pairs = [(line["images"], line.get(key)) for line in self.lines(kind)]
        return [(x, math.nan if _number(y) is None else y) for x, y in pairs if isinstance(y, int | float)]

    @cached_property
    def images(self) -> int:
        return max((line["images"] for line in self.stats), default=0)

    @property
    def warnings(self) -> list[dict[str, Any]]:
        return self.lines("warning")

    @property
    def warning_count(self) -> int:
        return len(self.warnings)

    # -- in words ---------------------------------------------------------------------------------------------------

    @property
    def method(self) -> str:
        objective = self.get("objective") or {}
        name = str(_get(objective, "method") or "")
        if self.pretraining:
            return "Pretraining"
        match name:
            case "dmd":
                return "DMD" if _get(objective, "regression_weight") != 0 else "DMD without regression"
            case "dmd2":
                return "DMD2 with GAN" if _get(objective, "gan_weight") != 0 else "DMD2 without GAN"
            case "sid":
                return "SiD"
        return name or "Unknown method"

    @property
    def calls(self) -> int | None:
        calls = self.get("generator", "sigmas") or self.get("generator", "times")
        return len(calls) if isinstance(calls, list) else None

    @property
    def teacher(self) -> str:
        if self.pretraining:
            return str(self.card.get("data") or self.get("data", "path") or self.get("data", "kind") or "unknown data")
        named = self.card.get("teacher") or self.get("teacher", "path") or self.get("teacher", "kind")
        return str(named or "unknown")

    @property
    def title(self) -> str:
        if self.pretraining:
            return f"A teacher, trained on {self.teacher}"
        steps = ", one step" if self.calls == 1 else f", {self.calls} steps" if self.calls else ""
        return f"{self.method}{steps}, from the teacher {self.teacher}"

    @property
    def total(self) -> int | None:
        """Length of the whole run in images."""
        total = self.get("train", "images")
        return total if isinstance(total, int) and total > 0 else None

    @property
    def finished(self) -> bool:
        return self.total is not None and self.images >= self.total

    @property
    def progress(self) -> str:
        if self.total is None:
            return f"{self.images:,}"
        done = "finished" if self.finished else f"{100 * self.images // self.total} % of {self.total:,}"
        return f"{self.images:,} ({done})"

    @cached_property
    def clock(self) -> list[tuple[float, float]]:
        """(images, seconds of training until then): the run's clock without its evaluations."""
        spent, points = 0.0, []
        for line in self.times:
            spent += _number(line.get("evaluation_seconds")) or 0.0
            points.append((line["images"], max(0.0, (_number(line.get("seconds")) or 0.0) - spent)))
        return points

    @property
    def rate(self) -> float:
        """Images a second of training."""
        return self.clock[-1][0] / self.training_seconds if self.training_seconds else 0.0

    @property
    def training_seconds(self) -> float | None:
        return self.clock[-1][1] if self.clock and self.clock[-1][0] > 0 else None

    @cached_property
    def fid(self) -> list[tuple[float, float]]:
        return [(images, fid) for images, fid in self.points("fid", "evaluation") if fid == fid]

    @property
    def best(self) -> tuple[float, float] | None:
        return min(self.fid, key=lambda point: point[1], default=None)

    def when(self, every: str) -> str:
        """When something that happens every so many images comes next."""
        step = self.get("train", every)
        if not isinstance(step, int) or step <= 0:
            return "at the end of the run"
        return f"at {(self.images // step + 1) * step:,} images"

    @property
    def lead(self) -> str:
        """The result in one sentence, if there is one."""
        rows = [row for row in self.rows if _number(row.get("fid")) is not None]
        own = next((row for row in rows if not _is_teacher(row) and self.owns(row)), None)
        teacher = _teacher_row(row for row in rows if own and row.get("protocol") == own.get("protocol"))
        if own is None or teacher is None or not teacher["fid"]:
            return ""
        text = f"FID {own['fid']:.2f}, {own['fid'] / teacher['fid']:.2f} times the teacher's {teacher['fid']:.2f}"
        calls, many = own.get("calls"), teacher.get("calls")
        if calls and many:
            text = (
                f"{'One network call' if calls == 1 else f'{calls} network calls'} an image instead of {many}. {text}"
            )
        speed, slow = (_number(row.get("images_per_second")) for row in (own, teacher))
        return f"{text}; {speed / slow:.3g} times as many images a second." if speed and slow else f"{text}."

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the final evaluation."""
        rows = self.results.get("rows")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    def owns(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of results is of the weights in this folder (or, where it names no weights, is from here)."""
        sha256 = row.get("sha256")
        return sha256 == self.header.get("sha256") if sha256 else any(row is own for own in self.rows)

    @property
    def points_only(self) -> bool:
        """Whether samples are no images (those of the analytic mixture are points)."""
        return self.get("teacher", "kind") == "mixture"

    @property
    def path(self) -> str:
        """The folder as a shell takes it."""
        return shlex.quote(str(self.folder))

    # -- pictures ---------------------------------------------------------------------------------------------------

    def drawn(self, name: str) -> list[tuple[int, Path]]:
        """(images, file) of the pictures `name-IMAGES.png`, in order."""
        found = (self.folder / "pictures").glob(f"{name}-*.png")
        return sorted((int(path.stem.split("-")[1]), path) for path in found if path.stem.split("-")[1].isdigit())

    def open(self, path: Path) -> Image.Image | None:
        """A picture; None, and a problem named, if it cannot be read (the run may be writing it just now)."""
        try:
            with Image.open(path) as picture:
                return picture.convert("L" if picture.mode in ("1", "L") else "RGB")
        except (OSError, SyntaxError, ValueError) as error:
            problem = f"pictures/{path.name} cannot be read and is left out: {error}"
            if problem not in self.problems:
                self.problems.append(problem)
            return None

    @cached_property
    def teacher_grid(self) -> Image.Image | None:
        path = self.folder / "pictures" / "teacher.png"
        return self.open(path) if path.exists() else None

    @cached_property
    def student_grid(self) -> tuple[int, Image.Image] | None:
        for images, path in reversed(self.drawn("samples" if self.pretraining else "student")):
            picture = self.open(path)
            if picture is not None:
                return images, picture
        return None


@dataclass(frozen=True)
class _Picture:
    """An image of the page; `rows` names its rows."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str
    rows: tuple[str, ...] = ()


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _number(value: Any) -> float | None:
    """A number that can be drawn; None for all else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e100 else None


def _get(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(parts[-length:]) for parts in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


# -- tables ------------------------------------------------------------------------------------------------------------

_METRICS = {  # key: header, format, which is better
    "fid": ("FID", ".2f", min),
    "kid": ("KID × 10³", ".2f", min),
    "precision": ("Precision", ".3f", max),
    "recall": ("Recall", ".3f", max),
    "images_per_second": ("Images a second", ",.4g", None),
}


def _is_teacher(row: Mapping[str, Any]) -> bool:
    """Rows of teachers are named "NAME, N evaluations"."""
    return re.search(r", [\d,]+ evaluations?$", str(row.get("name"))) is not None


def _teacher_row(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The teacher at its largest number of evaluations."""
    scored = [row for row in rows if _is_teacher(row) and _number(row.get("fid")) is not None]
    return max(scored, key=lambda row: _number(row.get("calls")) or 0, default=None)


def _results(runs: Sequence[_Run]) -> dict[str, Any]:
    """The results table: rows of final evaluations, and the last numbers of runs that have none."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    about = []
    for run in runs:
        found = run.rows
        for row in found:
            owner = next((other for other in runs if not _is_teacher(row) and other.owns(row)), None)
            stale = owner is None and any(row.get("name") == other.folder.resolve().name for other in runs)
            note = owner.method if owner else "weights of an earlier time" if stale else ""
            name = owner.label if owner and row.get("sha256") else row.get("name") or "unnamed"
            key = (row.get("sha256") or row.get("name"), row.get("calls"), row.get("protocol"))
            rows.setdefault(key, row | {"name": name, "note": note})
        if found:
            made = [run.results.get(name) for name in ("hardware", "date")]
            seeds = run.results.get("seeds", run.results.get("seed"))
            made.append(f"seeds {seeds}" if seeds is not None else None)
            about.append((str(run.results.get("command") or ""), ", ".join(str(part) for part in made if part)))
        scored = [line for line in run.lines("evaluation") if _number(line.get("fid")) is not None]
        if scored and not any(run.owns(row) for row in found if run.pretraining or not _is_teacher(row)):
            note = f"{run.method}, during training, at {scored[-1]['images']:,} images"
            rows[run.label, "so far"] = scored[-1] | {"name": run.label, "note": note}
    listed = sorted(rows.values(), key=lambda row: (not _is_teacher(row), -(_number(row.get("calls")) or 0)))
    shown = [key for key in _METRICS if any(_number(row.get(key)) is not None for row in listed)]
    protocols = list(dict.fromkeys(str(row["protocol"]) for row in listed if row.get("protocol")))
    marks = {protocol: chr(ord("a") + index % 26) for index, protocol in enumerate(protocols)}
    samples = {str(row.get("protocol")): row for row in listed}
    for row in listed:
        rivals = [other for other in listed if other.get("protocol") == row.get("protocol")]
        row["teacher"] = _is_teacher(row)
        row["mark"] = marks.get(str(row.get("protocol")), "")
        row["cells"] = [_cell(row, key, rivals) for key in shown]
        row["calls_text"] = f"{row['calls']:,}" if isinstance(row.get("calls"), int) else "–"
        row["n_text"] = f"{row['n']:,}" if isinstance(row.get("n"), int) else "–"
    return {
        "rows": listed,
        "marked": any(cell["best"] for row in listed for cell in row["cells"]),
        "headers": [_METRICS[key][0] for key in shown],
        "protocols": [_protocol(marks[name], name, samples[name]) for name in protocols],
        "about": list(dict.fromkeys(about)),
        "missing": [run for run in runs if not run.rows],
    }


def _cell(row: Mapping[str, Any], key: str, rivals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    value = _number(row.get(key))
    if value is None:
        return {"text": "–", "best": False}
    _, form, better = _METRICS[key]
    values = [number for other in rivals if (number := _number(other.get(key))) is not None]
    text = format(value * 1000 if key == "kid" else value, form)
    if key == "kid" and _number(row.get("kid_std")) is not None:
        text += f" ± {1000 * row['kid_std']:.2f}"
    return {"text": text, "best": better is not None and len(values) > 1 and value == better(values)}


def _protocol(mark: str, protocol: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A footnote: the id, and what a reader must know to trust numbers under it."""
    notes = []
    if isinstance(row.get("n"), int) and row["n"] < USUAL_SAMPLES:
        few = f"{row['n']:,} samples, fewer than the {USUAL_SAMPLES:,} of published FIDs"
        notes.append(f"{few}: FID reads the higher, the fewer there are.")
    if "inception" not in protocol:
        notes.append("Not Inception's features: these numbers compare with each other, not with published ones.")
    return {"mark": mark, "id": protocol, "notes": notes + [str(text) for text in row.get("warnings") or []]}


def _evaluations(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """The evaluations made during training, as a table for each run."""
    tables = []
    for run in runs:
        lines = [line for line in run.lines("evaluation") if line.keys() & _METRICS.keys()]
        keys = [key for key in _METRICS if any(key in line for line in lines)]
        rows = []
        for line in lines:
            seconds = _seconds_at(run, line["images"])
            cells = [_cell(line, key, ())["text"] for key in keys]
            rows.append([f"{line['images']:,}", _duration(seconds) if seconds is not None else "–", *cells])
        if rows:
            tables.append({"run": run, "headers": [_METRICS[key][0] for key in keys], "rows": rows})
    return tables


def _differences(runs: Sequence[_Run]) -> list[list[str]]:
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


@dataclass(frozen=True)
class _Series:
    label: str
    points: Sequence[tuple[float, float]]
    look: int


@dataclass
class _Chart:
    """Lines over images (or time). `svg()` draws it; `look` numbers choose colour, dash and marker together."""

    title: str
    how: str
    series: list[_Series]
    wide: bool = False
    time: bool = False
    lines: list[tuple[str, float]] = field(default_factory=list)
    """Horizontal lines: label, height."""

    @property
    def legend(self) -> list[dict[str, Any]]:
        last = [next((y for _, y in reversed(s.points) if math.isfinite(y)), math.nan) for s in self.series]
        return [
            {"swatch": _swatch(s.look, self.wide), "label": s.label, "last": _short(y)}
            for s, y in zip(self.series, last, strict=True)
        ]

    def svg(self) -> Markup:
        """The drawing, with a summary in words for those who cannot see it."""
        width, height, size = (430, 285, 12.5) if self.wide else (330, 190, 11)
        left, right, top, bottom = 46, width - 12, 10, height - 2.9 * size
        points = [(x, y) for s in self.series for x, y in s.points if math.isfinite(y)]
        ys = [y for _, y in points] + [y for _, y in self.lines]
        log_y = min(ys) > 1e-100 and (self.wide or max(ys) > 20 * min(ys))
        x_axis = _Axis([x for x, _ in points], left, right, self.wide, self.time)
        y_axis = _Axis(ys, bottom, top, log_y)
        parts = []
        for place, label in y_axis.ticks(6 if self.wide else 4):
            parts.append(f'<path class="grid" d="M{left} {place:.1f}H{right}"/>')
            parts.append(f'<text x="{left - 6}" y="{place + 0.35 * size:.1f}" text-anchor="end">{label}</text>')
        for place, label in x_axis.ticks(5):
            parts.append(f'<path class="grid" d="M{place:.1f} {bottom:.1f}v4"/>')
            parts.append(f'<text x="{place:.1f}" y="{bottom + 1.4 * size:.1f}" text-anchor="middle">{label}</text>')
        name = ("training time" if self.time else "images seen") + (", log" if self.wide else "")
        parts.append(f'<text x="{right}" y="{height - 3}" text-anchor="end">{name}</text>')
        parts.append(f'<path class="axis" d="M{left} {bottom:.1f}H{right}"/>')
        for label, y in self.lines:
            place = y_axis(y)
            above = place - 5 if place - top > 2 * size else place + size + 2
            parts.append(f'<path class="reference" d="M{left} {place:.1f}H{right}"/>')
            text = f"{html.escape(label)}: {_short(y)}"
            parts.append(f'<text class="halo" x="{right}" y="{above:.1f}" text-anchor="end">{text}</text>')
        for s in self.series:
            parts.append(f'<g class="s{s.look % 6}">{self._line(s, x_axis, y_axis)}</g>')
        words = html.escape(self.words())
        head = f'<svg viewBox="0 0 {width} {height}" font-size="{size}" role="img" aria-label="{words}">'
        return Markup(f"{head}{''.join(parts)}</svg>")

    def _line(self, series: _Series, x_axis: _Axis, y_axis: _Axis) -> str:
        points = list(series.points) if self.wide else _thinned(series.points)
        drawn, pen = [], "M"
        for x, y in points:
            if math.isfinite(y):
                drawn.append(f"{pen}{x_axis(x):.1f} {y_axis(y):.1f}")
            pen = "L" if math.isfinite(y) else "M"
        parts = [f'<path class="line" stroke-dasharray="{_dash(series.look)}" d="{"".join(drawn)}"/>']
        if self.wide:
            for x, y in points:
                at = _duration(x) if self.time else f"{x:,.0f} images"
                title = html.escape(f"{series.label}, {at}: {_short(y)}")
                parts.append(_marker(series.look, x_axis(x), y_axis(y), title))
        elif len(drawn) == 1:
            x, y = next(point for point in points if math.isfinite(point[1]))
            parts.append(_marker(0, x_axis(x), y_axis(y), _short(y)))
        return "".join(parts)

    def words(self) -> str:
        """What the chart shows, in words."""
        parts = []
        for s in self.series:
            ys = [y for _, y in s.points if math.isfinite(y)]
            low, high = _short(min(ys)), _short(max(ys))
            parts.append(f"{s.label} from {_short(ys[0])} to {_short(ys[-1])}, between {low} and {high}".strip())
        parts += [f"{label} at {_short(y)}" for label, y in self.lines]
        over = "training time" if self.time else "images seen"
        return f"Line chart: {self.title} over {over}. {'; '.join(parts)}."


class _Axis:
    """Values to places on the page, linear or logarithmic."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool, time: bool = False) -> None:
        low, high = min(values), max(values)
        self.start, self.end, self.log, self.time = start, end, log, time
        if log:
            room = 1.06 if high > low else 2.0
            self.low, self.high = math.log10(low / room), math.log10(high * room)
        else:
            if 0 <= low < 0.6 * high:
                low = 0.0
            room = 0.04 * (high - low) or abs(high) or 1.0
            self.low, self.high = low - (room if low else 0.0), high + room

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """At most `most` round values: place and text."""
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        label = _duration if self.time else _short
        return [(self(value), label(value)) for value in _round_values(low, high, self.log, self.time, most)]


_DURATIONS = [  # round numbers of seconds, minutes, hours and days: many, some, few
    [count * unit for unit, counts in zip((1, 60, 3600, 86400), ladder, strict=True) for count in counts]
    for ladder in (
        (
            (1, 2, 3, 5, 10, 15, 20, 30, 40),
            (1, 2, 3, 5, 10, 15, 20, 30, 40),
            (1, 1.5, 2, 3, 4, 6, 8, 12, 18),
            (1, 2, 3, 5, 7, 10, 14, 20),
        ),
        ((1, 2, 5, 10, 30), (1, 2, 5, 10, 30), (1, 2, 5, 12), (1, 2, 5, 10, 20)),
        ((1, 10), (1, 10), (1, 10), (10, 100)),
    )
]


def _round_values(low: float, high: float, log: bool, time: bool, most: int) -> list[float]:
    """At most `most` round values between `low` and `high`, two of them if there are."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
        ladders = _DURATIONS if time else [[digit * 10.0**k for k in decades for digit in some] for some in digits]
        found = [[value for value in ladder if low <= value <= high] for ladder in ladders]
        for inside in found:
            if 2 <= len(inside) <= most:
                return inside
        crowded = [inside for inside in found if len(inside) > most]
        if crowded:
            return crowded[-1][:: -(-len(crowded[-1]) // most)]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * 0.999)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _thinned(points: Sequence[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of its neighbourhood."""
    size = -(-len(points) // most)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _dash(look: int) -> str:
    return ("none", "7 3", "2.5 2.5", "9 3 2.5 3")[look % 4]


def _marker(look: int, x: float, y: float, title: str) -> str:
    circle, square = "m-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0", "m-3.3-3.3h6.6v6.6h-6.6z"
    triangle, diamond = "m0-4.4 4.2 7.4h-8.4z", "m0-4.6 4.6 4.6-4.6 4.6-4.6-4.6z"
    shape = (circle, square, triangle, diamond)[look % 4]
    return f'<path fill="currentColor" d="M{x:.1f} {y:.1f}{shape}"><title>{title}</title></path>'


def _swatch(look: int, marker: bool) -> Markup:
    """The piece of line that a legend shows."""
    line = f'<path class="line" stroke-dasharray="{_dash(look)}" d="M0 6H30"/>'
    return Markup(
        f'<svg class="swatch s{look % 6}" viewBox="0 0 30 12" width="30" height="12" aria-hidden="true">'
        f"{line}{_marker(look, 15, 6, '') if marker else ''}</svg>"
    )


def _curves(runs: Sequence[_Run]) -> list[_Chart]:
    """FID over images and over training time, all runs in one figure."""
    references = {}
    for run in runs:
        row = _teacher_row(run.rows)
        if row is not None and row["fid"] > 0:
            references[str(row.get("name")), row["fid"]] = (f"teacher ({row.get('calls', '?')} calls)", row["fid"])
    positive = [(run, [(x, y) for x, y in run.fid if x > 0 and y > 0]) for run in runs]
    clocked = [(run, [(s, y) for x, y in points if (s := _seconds_at(run, x))]) for run, points in positive]
    charts = []
    for title, found, time in (("FID and images seen", positive, False), ("FID and training time", clocked, True)):
        series = [_Series(run.label, points, run.look) for run, points in found if points]
        if series:
            how = (
                "Training alone: the time of evaluations and pictures is left out."
                if time
                else "Healthy: a straight fall on these logarithmic scales; where it bends flat, more images buy little."
            )
            charts.append(_Chart(title, how, series, wide=True, time=time, lines=list(references.values())))
    return charts


def _curve_note(runs: Sequence[_Run]) -> str:
    """What the points of the curves were measured with, and what has no place on a log axis: the start."""
    scored = [line for run in runs for line in run.lines("evaluation") if _number(line.get("fid")) is not None]
    sizes = sorted({line["n"] for line in scored if isinstance(line.get("n"), int)})
    notes = [f"Each point: {' or '.join(f'{n:,}' for n in sizes)} samples of the averaged weights."] if sizes else []
    names = {run.label: f"{run.label} " if len(runs) > 1 else "" for run in runs}
    starts = [f"{names[run.label]}{run.fid[0][1]:.2f}" for run in runs if run.fid and run.fid[0][0] == 0]
    if starts:
        notes.append(f"Before training: {', '.join(starts)}.")
    teachers = [row for run in runs if (row := _teacher_row(run.rows))]
    if len({line.get("protocol") for line in [*scored, *teachers]}) > 1:
        notes.append("Not all of these numbers were measured alike: FID reads the higher, the fewer samples there are.")
    return " ".join(notes)


def _seconds_at(run: _Run, images: float) -> float | None:
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


def _diagnostics(runs: Sequence[_Run]) -> dict[str, list[_Chart]]:
    """Small multiples by fold ("" is open): of one run several numbers in a chart, of several runs one number."""
    unknown = [key for run in runs for line in run.lines("train") for key in line if key not in ("images", "kind")]
    unknown = list(dict.fromkeys(unknown))
    folds: dict[str, list[_Chart]] = {}

    def add(what: _Diagnostic, keys: Mapping[str, str]) -> None:
        if len(runs) == 1:
            lines = [_Series(name, runs[0].points(key), look) for look, (key, name) in enumerate(keys.items())]
            charts = [_Chart(what.title, what.how, lines)]
        else:
            charts = []
            for key, name in keys.items():
                lines = [_Series(run.label, run.points(key), run.look) for run in runs]
                charts.append(_Chart(f"{what.title}: {name}".removesuffix(": "), what.how, lines))
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


def _side_by_side(runs: Sequence[_Run]) -> dict[str, Any]:
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


def _pictures(run: _Run, most: int) -> dict[str, _Picture | None]:
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
    strips = [(_short(images), picture) for images, path in chosen if (picture := run.open(path)) is not None]
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


# -- numbers in words --------------------------------------------------------------------------------------------------


def _short(value: float) -> str:
    """Three digits, thousands as k and M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}".replace("-", "−")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 86400 else f"{seconds / 86400:.3g} d"


def _join(values: Any) -> str:
    return ", ".join(f"{value:g}" if _number(value) is not None else str(value) for value in values)
