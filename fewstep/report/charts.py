"""Line charts over images or training time, for a page (SVG) or as a picture (PNG). Knows no run folder.

matplotlib draws. The SVG's colours are replaced by CSS variables, so that charts follow the reader's light or dark scheme.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Chart", "Series", "duration", "save_charts", "short"]

COLOURS = ("#0072b2", "#c8500a", "#00795a", "#a8457f", "#806600", "#4a5560")
DASHES = ("-", "--", ":", "-.")
MARKERS = "os^D"
TEXT, MUTED, GRID = "#1d2126", "#59616b", "#e9ebee"
VARIABLES = {colour: f"var(--s{i})" for i, colour in enumerate(COLOURS)} | {
    TEXT: "var(--text)", MUTED: "var(--muted)", GRID: "var(--grid)"
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.size": 10, "svg.fonttype": "none", "text.color": MUTED, "axes.labelcolor": MUTED, "axes.edgecolor": GRID,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.minor.size": 0, "ytick.minor.size": 0, "axes.grid": True,
    "axes.facecolor": "none", "grid.color": GRID, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
}  # fmt: skip
ROUND_TIMES = [n * unit for unit in (1, 60) for n in (1, 2, 5, 10, 30)] + [n * 3600 for n in (1, 2, 5, 12, 24, 72, 168)]


@dataclass(frozen=True)
class Series:
    """One line. `look` selects colour, dash and marker."""

    label: str
    points: Sequence[tuple[float, float]]
    look: int


@dataclass
class Chart:
    """Lines over images seen, or over seconds if `time`. A `wide` chart is large, logarithmic and has markers."""

    title: str
    how: str
    """How to read it."""
    series: list[Series]
    wide: bool = False
    time: bool = False
    lines: list[tuple[str, float]] = field(default_factory=list)
    """Horizontal lines: label, height."""

    @property
    def legend(self) -> list[dict[str, Any]]:
        """Legend above the drawing: look, label and last value of each line."""
        last = [next((y for _, y in reversed(s.points) if math.isfinite(y)), math.nan) for s in self.series]
        return [{"look": s.look, "label": s.label, "last": short(y)} for s, y in zip(self.series, last, strict=True)]

    def svg(self) -> Markup:
        """Render as SVG, with a summary in words for screen readers."""
        import matplotlib
        from matplotlib.figure import Figure

        file = io.StringIO()
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": self.title}):
            figure = Figure(figsize=(6.2, 4.1) if self.wide else (4.4, 2.5), layout="constrained")
            figure.patch.set_alpha(0)
            self.draw(figure.add_subplot())
            figure.savefig(file, format="svg", metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
        text = file.getvalue()
        text = text[text.index("<svg ") :].replace(
            "<svg ", f'<svg role="img" aria-label="{html.escape(self.words())}" ', 1
        )
        for colour, variable in VARIABLES.items():
            text = text.replace(colour, variable)
        return Markup(text)

    def draw(self, axes: Axes) -> None:
        """Draw into matplotlib axes."""
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

        for s in self.series:
            points = s.points if self.wide else _thinned(s.points)
            marker = MARKERS[s.look % 4] if self.wide or len(points) == 1 else ""
            axes.plot(
                [x for x, _ in points],
                [y if math.isfinite(y) else math.nan for _, y in points],
                color=COLOURS[s.look % 6], linestyle=DASHES[s.look % 4], marker=marker, markersize=5, linewidth=1.6,
                label=s.label, clip_on=False,
            )  # fmt: skip
        for label, y in self.lines:
            axes.axhline(y, color=TEXT, linestyle=":", linewidth=1.2, clip_on=False)
            axes.annotate(
                f"{label}: {short(y)}", (0, y), (4, 4), xycoords=("axes fraction", "data"), textcoords="offset points",
                color=TEXT,
            )  # fmt: skip
        ys = [y for s in self.series for _, y in s.points if math.isfinite(y)] + [y for _, y in self.lines]
        number, seconds = FuncFormatter(lambda value, _: short(value)), FuncFormatter(lambda value, _: duration(value))
        if min(ys) > 1e-100 and (self.wide or max(ys) > 20 * min(ys)):
            axes.set_yscale("log")
            decades = math.log10(max(ys) / min(ys))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=8))
        elif 0 <= min(ys) < 0.6 * max(ys):
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(number)
        if self.wide:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        if self.time:
            low, high = axes.get_xlim()
            axes.set_xticks([t for t in ROUND_TIMES if low <= t <= high] or [low, high])
        axes.xaxis.set_major_formatter(seconds if self.time else number)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(("training time" if self.time else "images seen") + (", log" if self.wide else ""), loc="right")

    def words(self) -> str:
        """Describe the chart in words."""
        parts = []
        for s in self.series:
            ys = [y for _, y in s.points if math.isfinite(y)]
            low, high = short(min(ys)), short(max(ys))
            parts.append(f"{s.label} from {short(ys[0])} to {short(ys[-1])}, between {low} and {high}".strip())
        parts += [f"{label} at {short(y)}" for label, y in self.lines]
        over = "training time" if self.time else "images seen"
        return f"Line chart: {self.title} over {over}. {'; '.join(parts)}."


def save_charts(charts: Sequence[Chart], path: Path) -> Path:
    """Draw charts side by side into one PNG, with legends, on white; returns `path`."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2 * len(charts), 4.4), layout="constrained", dpi=110)
        for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
            chart.draw(axes)
            axes.set_title(chart.title, loc="left", color=TEXT)
        # one legend below all charts hides no curve
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)), frameon=False, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return path


def _thinned(points: Sequence[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """Reduce to at most `most` points, each the mean of its neighbourhood."""
    size = -(-len(points) // most)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def short(value: float) -> str:
    """Format with three digits, thousands as k and M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}".replace("-", "−")


def duration(seconds: float) -> str:
    """Format seconds in a suitable unit, three digits."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 86400 else f"{seconds / 86400:.3g} d"
