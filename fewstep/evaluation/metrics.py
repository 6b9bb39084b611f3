"""One table of all metrics: name, header, digits, direction, and which of them `metrics` may name.

Run files, the command line, checkpoints, terminal and page read it. This module measures nothing and does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

__all__ = [
    "ASKED", "BY_KEY", "IDENTITY", "MEASURES", "METRICS", "Column", "Metric", "best", "columns_of", "deciding", "merit", "notes_of", "number",
    "same", "text_of",
]  # fmt: skip

Direction = Literal["lower", "higher"]

IDENTITY = (
    "sha256", "calls", "times", "churn", "sampler", "guidance", "precision_of_networks", "prompts", "codec",
    "protocol", "patch_protocol", "judge", "metrics", "repeat",
)  # fmt: skip
"""Entries of a row that determine its numbers. Rows in which these are equal are the same measurement."""


@dataclass(frozen=True)
class Column:
    """Display of a metric.

    Attributes:
        key: name in results.json.
        header: header of its column, including the factor.
        decimals: digits after the point. Smaller values get two significant digits.
        better: direction; None: neither larger nor smaller is better.
        factor: factor on the displayed value.
        significant: three significant digits and separated thousands instead of `decimals`.
        under: entry of a row that holds its protocol.
        asked: "usual": measured by default; "named": measured if `metrics` names it; None: `metrics` cannot name it.
        fewest: smallest number of generated images.
    """

    key: str
    header: str
    decimals: int
    better: Direction | None = None
    factor: float = 1.0
    significant: bool = False
    under: str = "protocol"
    asked: Literal["usual", "named"] | None = None
    fewest: int = 2

    def form(self, value: float) -> str:
        """Format a value, such as `0.45` for a KID of 0.00045."""
        scaled = value * self.factor
        if self.significant and scaled:
            return f"{scaled:,.{max(0, 2 - math.floor(math.log10(abs(scaled))))}f}"
        if scaled and abs(scaled) < 10**-self.decimals:
            return f"{scaled:.2g}"
        return f"{scaled:.{self.decimals}f}"

    @property
    def sign(self) -> int:
        """Factor that makes lower values better: -1 if higher is better."""
        return -1 if self.better == "higher" else 1

    @property
    def title(self) -> str:
        """Header with a capital first letter."""
        return self.header[0].upper() + self.header[1:]


NEIGHBOURS = 3  # k of precision and recall
BALLS = 5  # k of density and coverage, as in Naeem et al.'s experiments
ISC_SPLITS = 10  # parts of the images over which the Inception score's spread is taken

MEASURES = (
    Column("fid", "FID", 2, "lower", asked="usual"),
    Column("patch_fid", "patch FID", 2, "lower", under="patch_protocol"),
    Column("kid", "KID × 10³", 2, "lower", 1000.0, asked="usual"),
    Column("precision", "precision", 3, "higher", asked="usual", fewest=NEIGHBOURS + 1),
    Column("recall", "recall", 3, "higher", asked="usual", fewest=NEIGHBOURS + 1),
    Column("isc", "Inception score", 2, "higher", asked="named", fewest=ISC_SPLITS),
    Column("density", "density", 3, "higher", asked="named"),
    Column("coverage", "coverage", 3, "higher", asked="named"),
    Column("clip_score", "CLIP score", 3, "higher", under="judge"),
    Column("retrieval", "retrieval", 3, "higher", under="judge"),
    Column("diversity", "diversity", 3),  # no direction: higher is better only up to the diversity of real pictures
    Column("chroma", "chroma", 3),
    Column("probe_distance", "distance to the teacher", 3, "lower", under="probe"),
    Column("probe_diversity", "diversity / teacher's", 3, under="probe"),
    Column("probe_chroma", "chroma / teacher's", 3, under="probe"),
    Column("probe_sharpness", "sharpness / teacher's", 3, under="probe"),
    Column("images_per_second", "images per second", 0, significant=True),
)

BY_KEY = {column.key: column for column in MEASURES}
ASKED = tuple(column.key for column in MEASURES if column.asked)
"""Names that `metrics` accepts."""
METRICS = tuple(column.key for column in MEASURES if column.asked == "usual")
"""Default of `metrics`."""

if TYPE_CHECKING:
    Metric = str
else:
    Metric = Literal[ASKED]


def number(value: Any) -> float | None:
    """Convert to a number that can be shown; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e100 else None


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Columns for which at least one row has a number."""
    return [column for column in MEASURES if any(number(row.get(column.key)) is not None for row in rows)]


def deciding(rows: Sequence[Mapping[str, Any]]) -> Column | None:
    """Metric that selects a run's best checkpoint: the first in the table that the rows have and that has a direction."""
    return next((column for column in columns_of(rows) if column.better is not None), None)


def merit(row: Mapping[str, Any]) -> float | None:
    """Deciding metric, negated if higher is better, so that lower is better. None if nothing was measured."""
    column = deciding([row])
    return None if column is None else column.sign * row[column.key]


def text_of(row: Mapping[str, Any], column: Column) -> str | None:
    """Format a row's number with its spread, such as `4.50 ± 0.10`; None if it has no number.

    The spread is over repetitions, else over the metric's own subsets (KID, Inception score).
    """
    value = number(row.get(column.key))
    if value is None:
        return None
    spreads = (number(row.get(f"{column.key}_{kind}")) for kind in ("spread", "std"))
    spread = next((found for found in spreads if found is not None), None)
    return column.form(value) + ("" if spread is None else f" ± {column.form(spread)}")


def notes_of(row: Mapping[str, Any]) -> list[str]:
    """Warnings of an evaluation as a list.

    Results hold a list; lines of stats.jsonl hold one joined text.
    """
    found = row.get("warnings")
    return [found] if isinstance(found, str) and found else [str(text) for text in found or ()]


def same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two rows have the same model, sampling and protocol."""
    return all(row.get(key) == other.get(key) for key in IDENTITY)


def best(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], column: Column) -> bool:
    """Return whether a row has the best number among those with the same protocol.

    False if "best" is not informative: a metric without a direction, a single comparable row, equal digits, or a lead within
    the spread over repetitions.
    """
    own = number(row.get(column.key))
    if own is None or column.better is None or not row.get(column.under):
        return False
    alike = (column.under, "n", "repeat")
    rivals = [
        (value, other)
        for other in rows
        if (value := number(other.get(column.key))) is not None
        and other is not row
        and all(row.get(key) == other.get(key) for key in alike)
    ]
    if not rivals:
        return False
    lead = min(column.sign * value for value, _ in rivals) - column.sign * own
    return lead > (number(row.get(f"{column.key}_spread")) or 0.0) and any(
        column.form(value) != column.form(own) for value, _ in rivals
    )
