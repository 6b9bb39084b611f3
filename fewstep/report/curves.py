"""Curves of a report: FID over images and time, and a run's logged diagnostics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewstep.evaluation.metrics import number
from fewstep.report.charts import Chart, Series
from fewstep.report.run_folder import RunFolder, teacher_row

__all__ = ["fid_curves"]


def fid_curves(folders: Sequence[Path]) -> list[Chart]:
    """Charts of several runs' FID over images seen and over training time.

    Raises:
        FileError: one is not a run folder.
    """
    return curves([RunFolder(folder, folder.name, look) for look, folder in enumerate(folders)])


def curves(runs: Sequence[RunFolder]) -> list[Chart]:
    """Charts of FID over images and over training time, all runs in one figure."""
    references = {}
    for run in runs:
        row = teacher_row(run.rows)
        if row is not None and row["fid"] > 0:
            references[str(row.get("name")), row["fid"]] = (f"teacher ({row.get('calls', '?')} calls)", row["fid"])
    positive = [(run, [(x, y) for x, y in run.fid if x > 0 and y > 0]) for run in runs]
    clocked = [(run, [(s, y) for x, y in points if (s := seconds_at(run, x))]) for run, points in positive]
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


def curve_note(runs: Sequence[RunFolder]) -> str:
    """Describe how the points were measured, and the initial values that a log axis cannot show."""
    scored = [line for run in runs for line in run.lines("evaluation") if number(line.get("fid")) is not None]
    sizes = sorted({line["n"] for line in scored if isinstance(line.get("n"), int)})
    notes = [f"Each point: {' or '.join(f'{n:,}' for n in sizes)} samples of the averaged weights."] if sizes else []
    names = {run.label: f"{run.label} " if len(runs) > 1 else "" for run in runs}
    starts = [f"{names[run.label]}{run.fid[0][1]:.2f}" for run in runs if run.fid and run.fid[0][0] == 0]
    if starts:
        notes.append(f"Before training: {', '.join(starts)}.")
    teachers = [row for run in runs if (row := teacher_row(run.rows))]
    if len({line.get("protocol") for line in [*scored, *teachers]}) > 1:
        notes.append("Not all of these scores have the same number of samples: fewer samples give a higher FID.")
    return " ".join(notes)


def seconds_at(run: RunFolder, images: float) -> float | None:
    """Training time until `images` were seen; None if the log ends earlier."""
    if not run.clock or images > run.clock[-1][0]:
        return None
    return float(np.interp(images, [0, *(x for x, _ in run.clock)], [0.0, *(seconds for _, seconds in run.clock)]))


@dataclass(frozen=True)
class _Diagnostic:
    """One chart of the small multiples: `keys` are logged numbers with their labels, or a prefix of their keys."""

    title: str
    how: str
    keys: dict[str, str] | str
    fold: str = ""
    kind: str = "train"
    best: float | None = None


_GAPS = {"gap_real": "|x − D_real|", "gap_fake": "|x − D_fake|", "gap_scores": "|D_real − D_fake|"}


_LEVELS = "By noise level"


_OTHERS = "Other logged numbers"


_DIAGNOSTICS = [
    _Diagnostic(
        "Distance to the teacher's samples",
        "Energy distance of a few dozen samples, in the teacher's diversity. Healthy: a fall towards 0.",
        {"probe_distance": ""},
        kind="evaluation",
        best=0.0,
    ),
    _Diagnostic(
        "Student relative to teacher",
        "Healthy: near 1. Low diversity is collapse, high chroma over-saturation, low sharpness blur.",
        {"probe_diversity": "diversity", "probe_chroma": "chroma", "probe_sharpness": "sharpness"},
        kind="evaluation",
        best=1.0,
    ),
    _Diagnostic(
        "Training and inference",
        "Distance of training's samples at the last step from those of inference. Healthy: near 0.",
        {"probe_mismatch": ""},
        kind="evaluation",
        best=0.0,
    ),
    _Diagnostic(
        "Distances",
        "Healthy: fake at or below real (the critic keeps up with the samples), and the two scores converge.",
        _GAPS,
    ),
    *(
        _Diagnostic(f"Distances, {where}", how, {f"{key}/{level}": name for key, name in _GAPS.items()}, _LEVELS)
        for level, where, how in (
            ("t0.00", "t 0 to ¼", "Hardly any noise: fine detail. If fake is far above real, detail is blurred."),
            (
                "t0.25",
                "t ¼ to ½",
                "Little noise: texture and edges. While the scores differ here, these are still being learnt.",
            ),
            ("t0.50", "t ½ to ¾", "Much noise: shapes. If the scores stay apart here, shapes are wrong or missing."),
            ("t0.75", "t ¾ to 1", "Mostly noise: only averages are visible, so real and fake nearly coincide."),
        )
    ),
    _Diagnostic(
        "Gradient norm on x, by term",
        "Healthy: steady or slowly falling; no term above thirty times another.",
        "x_gradient/",
    ),
    _Diagnostic(
        "Gradient norm of the networks",
        "Before clipping. Healthy: steady. A tenfold rise precedes divergence: lower that learning rate.",
        "gradient_norm",
    ),
    _Diagnostic(
        "Discriminator logits",
        "Above 0 means “looks real”. Healthy: real a little above generated. A growing margin is saturation.",
        {"logit_real": "real images", "logit_fake": "generated", "logit_generator": "generated, generator's update"},
    ),
    _Diagnostic(
        "Discriminator accuracy",
        "0.5 is chance. Healthy: below about 0.9. If both are near 1, the generator cannot learn from the GAN.",
        {"accuracy_real": "real images", "accuracy_fake": "generated"},
    ),
    _Diagnostic(
        "Spread of x",
        "Standard deviation over a batch. Healthy: steady; a lasting fall is collapse, a lasting rise drift.",
        {"x_spread": ""},
    ),
    _Diagnostic(
        "Mean of x",
        "Mean over a batch and all pixels. Healthy: steady; a slow change from its first value is drift.",
        {"x_mean": ""},
    ),
    _Diagnostic(
        "Regression on pairs",
        "Perceptual distance from the teacher's own images. Healthy: falling.",
        {"regression_distance": ""},
    ),
    _Diagnostic(
        "Denoising loss", "Healthy: falling, then flat. A lasting jump: the learning rate is too high.", {"loss": ""}
    ),
    _Diagnostic(
        "Losses",
        "Watch only for jumps: the value of a generator's loss is not informative.",
        "loss/",
        _OTHERS,
    ),
]


def diagnostics(runs: Sequence[RunFolder]) -> dict[str, list[Chart]]:
    """Small multiples by fold ("" is open): for one run several numbers per chart, for several runs one number per chart."""
    unknown = [key for run in runs for line in run.lines("train") for key in line if key not in ("images", "kind")]
    unknown = list(dict.fromkeys(unknown))
    folds: dict[str, list[Chart]] = {}

    def add(what: _Diagnostic, keys: Mapping[str, str]) -> None:
        if len(runs) == 1:
            lines = [
                Series(name, runs[0].points(key, what.kind), look) for look, (key, name) in enumerate(keys.items())
            ]
            charts = [Chart(what.title, what.how, lines)]
        else:
            charts = []
            for key, name in keys.items():
                lines = [Series(run.label, run.points(key, what.kind), run.look) for run in runs]
                charts.append(Chart(f"{what.title}: {name}".removesuffix(": "), what.how, lines))
        for chart in charts:
            if what.best is not None:
                chart.lines = [("as the teacher", what.best)]
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
