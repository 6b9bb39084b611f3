"""The page about a race: one table with spreads, what its differences mean, figures and samples, all made from its files."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fewstep.benchmark.race import Race, Student
from fewstep.data.dataset import shuffled_indices
from fewstep.evaluation.candidates import Candidate, data_of, find_teacher, load_candidate
from fewstep.evaluation.features import extractor_for
from fewstep.evaluation.metrics import BY_KEY
from fewstep.evaluation.reference import find_reference
from fewstep.evaluation.scores import evaluate
from fewstep.report.charts import duration, short
from fewstep.report.run_folder import RunFolder, is_teacher
from fewstep.students.sample import generate
from fewstep.system.files import atomic_write
from fewstep.system.pictures import grid
from fewstep.teachers.samplers import Best

__all__ = ["Line", "least_ratio", "lines", "write_page"]

COLUMNS = 20  # samples of a row of the sheet
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t at 97.5 % for 1 to 10 degrees of freedom; for n above 10, 1.96 + 2.6 / n is within half a percent."""


@dataclass
class Line:
    """One line of the table.

    Attributes:
        name: a student's name, or the teacher's or the real images' words.
        kind: real, teacher or student.
        calls: network calls per image; None for real images.
        scores: values of each seed by (extractor, metric).
        images: images seen in training, those of a start included.
        seconds: training time by seed.
    """

    name: str
    kind: str
    calls: int | None
    scores: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    images: int | None = None
    seconds: list[float] = field(default_factory=list)
    sampler: str = ""

    def mean(self, extractor: str, metric: str) -> float | None:
        """Mean over the seeds, if it was measured."""
        values = self.scores.get((extractor, metric))
        return statistics.fmean(values) if values else None


def lines(race: Race) -> list[Line]:
    """Lines of the table: real images, the teacher by falling calls, students by rising FID."""
    first = race.spec.extractors[0]
    by_name: dict[str, Line] = {}
    hashes = {RunFolder(race.folder(student), str(student), 0).header.get("sha256"): student for student in race.students
              if race.finished(student)}  # fmt: skip
    for extractor in race.spec.extractors:
        for row in race.rows(extractor):
            student = hashes.get(row["sha256"])
            if student is not None:
                line = by_name.setdefault(student.name, Line(student.name, "student", row["calls"]))
            elif is_teacher(row):
                name = f"teacher, {row['calls']} calls" if row["calls"] > 1 else "teacher, 1 call"
                line = by_name.setdefault(
                    name, Line(name, "teacher", row["calls"], sampler=str(row.get("sampler", "heun")))
                )
            else:
                continue
            for metric in race.spec.metrics:
                if isinstance(row.get(metric), int | float):
                    line.scores.setdefault((extractor, metric), []).append(row[metric])
    for student in hashes.values():
        folder = RunFolder(race.folder(student), str(student), 0)
        line = by_name[student.name]
        line.images = folder.images
        line.seconds.append(folder.training_seconds or math.nan)
    order = {"teacher": 0, "student": 1}

    def place(line: Line) -> tuple[int, float]:
        return order[line.kind], -(line.calls or 0) if line.kind == "teacher" else line.mean(first, "fid") or math.inf

    return [*_real(race), *sorted(by_name.values(), key=place)]


def least_ratio(all_lines: Sequence[Line], extractor: str) -> float | None:
    """Ratio of two students' FIDs from which on they differ (95 %): least significant difference of the logarithms.

    The spread of log FID over the seeds is pooled over the students; for n seeds and s students, t has s (n - 1) degrees of
    freedom, and two means differ by t spread sqrt(2 / n). None with one seed.
    """
    logs = [
        [math.log(value) for value in line.scores.get((extractor, "fid"), []) if value > 0]
        for line in all_lines
        if line.kind == "student"
    ]
    logs = [values for values in logs if len(values) > 1]
    if not logs:
        return None
    freedom = sum(len(values) - 1 for values in logs)
    pooled = math.sqrt(sum(statistics.variance(values) * (len(values) - 1) for values in logs) / freedom)
    t = T_975[freedom - 1] if freedom <= len(T_975) else 1.96 + 2.6 / freedom
    return math.exp(t * pooled * math.sqrt(2 / statistics.fmean(len(values) for values in logs)))


def write_page(race: Race) -> Path:
    """Write README.md, results.json, figures and the sheet of samples into the race's folder; returns the page."""
    spec, found = race.spec, lines(race)
    first = spec.extractors[0]
    record = [
        {
            "name": line.name, "kind": line.kind, "calls": line.calls, "sampler": line.sampler, "images": line.images,
            "seconds": line.seconds, "scores": {f"{extractor}/{metric}": values for (extractor, metric), values in line.scores.items()},
        }
        for line in found
    ]  # fmt: skip
    atomic_write(
        race.out / "results.json", json.dumps({"benchmark": spec.model_dump(mode="json"), "lines": record}, indent=1)
    )
    _figures(found, first, race.out / "figures.png")
    _sheet(race, found).save(race.out / "samples.png", optimize=True)
    _keep_logs(race)
    page = race.out / "README.md"
    atomic_write(page, "\n".join(_text(race, found)) + "\n")
    return page


def _text(race: Race, found: Sequence[Line]) -> Iterator[str]:
    spec, first = race.spec, race.spec.extractors[0]
    rows = race.rows(first)
    shown = [(first, metric) for metric in spec.metrics] + [(extractor, "fid") for extractor in spec.extractors[1:]]
    yield f"# {spec.title}"
    yield ""
    yield "Made by `fewstep benchmark`; do not edit. Settings: [benchmark.json](benchmark.json); all numbers:"
    yield "[results.json](results.json); logs of every run: [logs](logs)."
    yield ""
    for text in spec.notes:
        yield f"* {text}"
    yield ""
    heads = [
        f"{BY_KEY[metric].header} ({extractor})" if metric == "fid" else BY_KEY[metric].header
        for extractor, metric in shown
    ]
    yield f"| model | calls | {' | '.join(heads)} | images seen | training time |"
    yield f"|{'---|' * (len(heads) + 4)}"
    for line in found:
        cells = [_cell(line, extractor, metric) for extractor, metric in shown]
        cost = [
            f"{line.images:,}" if line.images else "",
            duration(statistics.fmean(line.seconds)) if line.seconds else "",
        ]
        yield f"| {line.name} | {line.calls or ''} | {' | '.join([*cells, *cost])} |"
    yield ""
    seeds = len(spec.seeds)
    yield f"{spec.samples:,} samples a score; students: mean ± standard deviation over {seeds} training seed(s)."
    ratio = least_ratio(found, first)
    if ratio is not None:
        yield (
            f"**Two students differ (95 %) where their FIDs ({first}) have a ratio above {ratio:.2f}**: the spread over seeds, "
            "pooled over all students."
        )
        yield from _groups([line for line in found if line.kind == "student"], first, ratio)
    else:
        yield "One seed: no difference between students is known to mean anything."
    samplers = [f"{line.calls}: `{line.sampler}`" for line in found if line.kind == "teacher"]
    yield f"Reference: {spec.reference}. The teacher's samplers, by calls: {', '.join(samplers)}."
    machines = sorted({f"{row['hardware']} ({row['precision_of_networks']})" for row in rows})
    yield f"Scored on {'; '.join(machines)}, {max(row['date'] for row in rows)}. Training times depend on"
    yield "what else the machine did, other students among it."
    yield ""
    unfinished = [student for student in race.students if not race.finished(student)]
    for student in unfinished:
        yield f"* Not trained to its end: {student}: {race.last_words(str(student))}"
    if unfinished:
        yield ""
    yield "![FID against network calls and against training time, precision against recall](figures.png)"
    yield ""
    yield "![Samples of the teacher and of every student from the same seeds and labels](samples.png)"


def _cell(line: Line, extractor: str, metric: str) -> str:
    column, values = BY_KEY[metric], line.scores.get((extractor, metric))
    if not values:
        return ""
    mean = column.form(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {column.form(statistics.stdev(values))}"


def _groups(students: Sequence[Line], extractor: str, ratio: float) -> Iterator[str]:
    """Say for the best student which others are no worse."""
    ranked = [(line, line.mean(extractor, "fid")) for line in students]
    best = ranked[0]
    level = [line.name for line, fid in ranked[1:] if fid is not None and best[1] and fid / best[1] < ratio]
    yield f"Not distinguished from the best, {best[0].name}: {', '.join(level) or 'none'}."


def _real(race: Race) -> list[Line]:
    """Score real training images as if they were generated: what no model can be expected to beat."""
    spec = race.spec
    teacher = find_teacher(spec.teacher, None).load()
    data = data_of(teacher.provenance)
    if data is None:
        return []
    images = data.load()
    count = min(spec.samples, len(images))
    chosen = shuffled_indices(len(images), 0, count, 0)
    line = Line(f"{count:,} real training images", "real", None)
    for extractor in spec.extractors:
        measure = extractor_for(teacher.shape, extractor, "cpu")
        metrics = spec.metrics if extractor == spec.extractors[0] else ("fid",)
        stats = find_reference(spec.reference, measure, teacher.shape)
        batches = (images.images[part] for part in chosen.split(250))
        scores = evaluate(batches, stats, measure, metrics=[metric for metric in metrics if metric != "isc"])
        for metric in metrics:
            if (value := getattr(scores, metric, None)) is not None:
                line.scores[extractor, metric] = [value]
    return [line]


def _figures(found: Sequence[Line], extractor: str, out: Path) -> None:
    """Draw FID over calls, FID over training time, and precision over recall."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    calls, cost, both = figure.subplots(1, 3)
    teacher = [line for line in found if line.kind == "teacher"]
    fids = [line.mean(extractor, "fid") or math.nan for line in teacher]
    calls.plot([line.calls for line in teacher], fids, "k--o", markersize=4, label="teacher, best samplers")
    students = sum(line.kind == "student" for line in found)
    for look, line in enumerate(line for line in found if line.kind == "student"):
        values = line.scores.get((extractor, "fid"), [])
        mean, low, high = statistics.fmean(values), min(values), max(values)
        style: dict[str, Any] = {
            "fmt": "os^Dv<>pP*"[look % 10],
            "color": f"C{look % 10}",
            "markersize": 6,
            "capsize": 2,
        }
        error = [[mean - low], [high - mean]]
        shift = (line.calls or 1) * 1.02 ** (look - students / 2)  # students of as many calls lie beside each other
        calls.errorbar([shift], [mean], yerr=error, label=line.name, **style)
        cost.errorbar([statistics.fmean(line.seconds) / 60], [mean], yerr=error, **style)
        recall, precision = line.mean(extractor, "recall"), line.mean(extractor, "precision")
        if recall is not None and precision is not None:
            both.plot([recall], [precision], style["fmt"], color=style["color"])
    for line in found:
        recall, precision = line.mean(extractor, "recall"), line.mean(extractor, "precision")
        if line.kind != "student" and recall is not None and precision is not None:
            both.plot([recall], [precision], "k*" if line.kind == "real" else "k.")
            both.annotate(
                "real" if line.kind == "real" else str(line.calls),
                (recall, precision),
                (4, 4),
                textcoords="offset points",
            )
    calls.set(
        xscale="log", yscale="log", xlabel="network calls", ylabel=f"FID ({extractor})", title="Quality and speed"
    )
    cost.set(yscale="log", xlabel="training minutes", ylabel=f"FID ({extractor})", title="Quality and training")
    both.set(xlabel="recall", ylabel="precision", title="Variety and quality")
    known = sorted({line.calls for line in found if line.calls})
    calls.set_xticks(known, [str(count) for count in known])
    calls.xaxis.set_minor_locator(NullLocator())
    number = FuncFormatter(lambda value, _: short(value))
    for axes in (calls, cost):
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter(number)
        # decades alone would leave a narrow range without a number
        axes.yaxis.set_minor_formatter(number if high < 12 * low else NullFormatter())
    for axes in (calls, cost, both):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(out, dpi=110)


def _sheet(race: Race, found: Sequence[Line]) -> Image.Image:
    """Draw a named row of each model from the same seeds and labels: the teacher at most and least calls, first seeds of students."""
    spec = race.spec
    known = [line.calls for line in found if line.kind == "teacher" and line.calls]
    models: list[tuple[str, Candidate]] = [
        (f"teacher, {calls}", load_candidate(spec.teacher, calls, solver=Best())) for calls in dict.fromkeys((max(known), min(known)))
    ]  # fmt: skip
    for line in found:
        if line.kind == "student":
            student = Student(line.name, next(seed for seed in spec.seeds if race.finished(Student(line.name, seed))))
            models.append((line.name, load_candidate(str(race.folder(student)))))
    strips = [(name, _strip(model)) for name, model in models]
    width, height = strips[0][1].size
    margin = 150
    made = Image.new("RGB", (margin + width, len(strips) * (height + 4)), "white")
    for index, (name, strip) in enumerate(strips):
        ImageDraw.Draw(made).text((4, index * (height + 4) + height // 2 - 6), name, fill="black")
        made.paste(strip.convert("RGB"), (margin, index * (height + 4)))
    return made


def _strip(model: Candidate) -> Image.Image:
    images: Tensor = torch.cat(list(generate(model.sampler, range(COLUMNS), model.shape, model.conditioner)))
    return grid(images, COLUMNS, scale=max(1, 32 // images.shape[-1]))


def _keep_logs(race: Race) -> None:
    """Copy settings and curves of every finished student to `logs/`, which is small enough to be kept with the page."""
    for student in race.students:
        for name in ("run.yaml", "stats.jsonl", "times.jsonl"):
            source = race.folder(student) / name
            if race.finished(student) and source.exists():
                target = race.out / "logs" / str(student) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(target, source.read_bytes())
