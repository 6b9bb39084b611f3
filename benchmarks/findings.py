"""Findings of a benchmark: one JSON line each, and the rows that they make together. Needs the standard library alone.

A line holds `stage`, `case` (what was running), `name` (of the row it belongs to), then `numbers` with their `unit`, a
`note`, an `error` or why it was `skipped`, and `hardware`, `torch`, `command` and `date` (when the command began).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Journal", "Row", "read", "rows", "table"]

CEILING = ("card", "product 8192 x 8192 x 8192")  # the row that achieved operations are compared with
CARDS = {
    "H100": "H100",
    "H200": "H100",
    "A100": "A100",
    "4090": "RTX 4090",
}  # part of a card's name -> its row in a plan


class Journal:
    """A file that lines are appended to and on the disk before anything else happens.

    Args:
        path: of the file; what it holds stays.
        common: goes into every line.
    """

    def __init__(self, path: Path, common: dict[str, Any]) -> None:
        self.path, self.common, self.lines = path, common, list[dict[str, Any]]()
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def add(self, line: dict[str, Any]) -> None:
        """Append one finding."""
        with self._lock:
            line = {**line, **self.common}
            self.lines.append(line)
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())


@dataclass
class Row:
    """Findings of one name.

    Attributes:
        numbers: name -> (value, unit).
        notes: in the order in which they came.
        errors: likewise.
        lines: all that the row was made of.
    """

    stage: str
    name: str
    numbers: dict[str, tuple[float, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def value(self, name: str) -> float | None:
        """A number without its unit; None if it was not found."""
        return self.numbers[name][0] if name in self.numbers else None


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; one that was cut off within is left out, because its run was killed while it wrote."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def rows(lines: Iterable[dict[str, Any]], stages: Sequence[str] = ()) -> list[Row]:
    """Findings by name, of each case those of its latest run, with what follows from several of them.

    Args:
        lines: of one file, or of several.
        stages: their order; others come last.
    """
    lines = list(lines)
    latest: dict[tuple[str, str], str] = {}
    for line in lines:
        if "skipped" not in line:  # it must not hide what an earlier run found
            key = line["stage"], line["case"]
            latest[key] = max(latest.get(key, ""), line["date"])
    found: dict[tuple[str, str], Row] = {}
    for line in lines:
        key = line["stage"], line["case"]
        if line["date"] != latest.get(key, line["date"]):
            continue
        row = found.setdefault((line["stage"], line["name"]), Row(line["stage"], line["name"]))
        row.lines.append(line)
        row.numbers |= {name: (value, line["unit"]) for name, value in line.get("numbers", {}).items()}
        row.notes += [line["note"]] if "note" in line else []
        row.notes += [line["skipped"]] if "skipped" in line else []
        row.errors += [line["error"]] if "error" in line else []
    ceiling = found[CEILING].value("bf16") if CEILING in found else None
    for row in found.values():
        _derive(row, ceiling)
    order = {stage: place for place, stage in enumerate(stages)}
    return sorted(found.values(), key=lambda row: order.get(row.stage, len(order)))


def _derive(row: Row, ceiling: float | None) -> None:
    """Add what follows: operations a second, their share of the ceiling, the plan's errors."""
    seconds, work = row.value("time"), row.value("work")
    if seconds and work:
        row.numbers["achieved"] = work / seconds, "TFLOP/s"
        if ceiling:
            row.numbers["share of the bf16 product"] = 100 * work / seconds / ceiling, "%"
    hardware = next((line["hardware"] for line in row.lines if "time" in line.get("numbers", {})), "")
    card = next((planned for part, planned in CARDS.items() if part in hardware), None)
    planned = {name: row.numbers.pop(name) for name in list(row.numbers) if name.startswith("time on ")}
    if card is not None and f"time on {card}" in planned:
        row.numbers["planned time"] = planned[f"time on {card}"]
    for what in ("memory", "time"):
        measured, expected = row.value(what), row.value(f"planned {what}")
        if measured and expected:
            row.numbers[f"plan's error in {what}"] = 100 * (expected / measured - 1), "%"


def table(found: list[Row], command: str = "") -> str:
    """All rows as text of three columns."""
    cells = []
    for row in found:
        parts = [f"{name} {number(value)} {unit}".rstrip() for name, (value, unit) in row.numbers.items()]
        cells.append((row.stage, row.name, "; ".join([*parts, *row.notes, *(f"FAILED: {e}" for e in row.errors)])))
    left, middle = (max([len(cell[i]) for cell in cells] or [0]) for i in (0, 1))
    lines = [f"{a:<{left}}  {b:<{middle}}  {c}" for a, b, c in cells]
    failed = sum(bool(row.errors) for row in found)
    return "\n".join([*([command] if command else []), *lines, f"{len(found)} rows, {failed} with failures"])


def number(value: float) -> str:
    """Three to four significant digits, without an exponent where that is short."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size and size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4g}"
