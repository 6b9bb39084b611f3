"""Tables of a report: scores with their protocols, and settings that differ between runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.evaluation.metrics import IDENTITY, MEASURES, Column, best, columns_of, deciding, notes_of, number, text_of
from fewstep.report.charts import duration
from fewstep.report.curves import seconds_at
from fewstep.report.run_folder import RunFolder, is_teacher

USUAL_SAMPLES = 50_000  # samples of published FIDs


def labels(folders: Sequence[Path]) -> list[str]:
    """Shortest path endings that distinguish the folders."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(parts[-length:]) for parts in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


def results(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Results table: rows of final evaluations, and the last scores of runs without one."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    about = []
    for run in runs:
        found = run.rows
        for row in found:
            owner = next((other for other in runs if not is_teacher(row) and other.owns(row)), None)
            stale = owner is None and any(row.get("name") == other.folder.resolve().name for other in runs)
            note = owner.method if owner else "earlier weights" if stale else ""
            name = owner.label if owner and row.get("sha256") else row.get("name") or "unnamed"
            key = tuple(json.dumps(value) for value in (row.get("sha256") or row.get("name"), *map(row.get, IDENTITY)))
            rows.setdefault(key, row | {"name": name, "note": note})
            made = [row.get("hardware"), row.get("date"), f"seeds {row['seeds']}" if row.get("seeds") else None]
            about.append((str(row.get("command") or ""), ", ".join(str(part) for part in made if part)))
        scored = [line for line in run.lines("evaluation") if deciding([line]) is not None]
        if scored and not any(run.owns(row) for row in found if run.pretraining or not is_teacher(row)):
            note = f"{run.method}, during training, at {scored[-1]['images']:,} images"
            rows[run.label, "so far"] = scored[-1] | {"name": run.label, "note": note}
    listed = sorted(rows.values(), key=lambda row: (not is_teacher(row), -(number(row.get("calls")) or 0)))
    shown = columns_of(listed)
    # one footnote for each combination of protocols and warnings
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
    """Protocols and warnings of a row."""
    under = dict.fromkeys(str(row[column.under]) for column in columns_of([row]) if row.get(column.under))
    return "; ".join(under), tuple(notes_of(row))


def _mark(index: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    return (_mark(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def _cell(row: Mapping[str, Any], column: Column, rivals: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"text": text_of(row, column) or "–", "best": best(row, rivals, column)}


def _protocol(mark: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Footnote: the protocol id and its warnings."""
    notes, (protocol, warnings) = [], _kind(row)
    if isinstance(row.get("n"), int) and row["n"] < USUAL_SAMPLES:
        few = f"{row['n']:,} samples, fewer than the {USUAL_SAMPLES:,} of published FIDs"
        notes.append(f"{few}: fewer samples give a higher FID.")
    if "inception" not in protocol:
        notes.append("Not Inception's features: these scores are comparable with each other, not with published ones.")
    return {"mark": mark, "id": protocol, "notes": notes, "warnings": warnings}


def evaluations(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    """Evaluations during training, one table per run."""
    tables = []
    measured = {column.key for column in MEASURES}
    for run in runs:
        lines = [line for line in run.lines("evaluation") if line.keys() & measured]
        columns = columns_of(lines)
        rows = []
        for line in lines:
            seconds = seconds_at(run, line["images"])
            cells = [text_of(line, column) or "–" for column in columns]
            rows.append([f"{line['images']:,}", duration(seconds) if seconds is not None else "–", *cells])
        if rows:
            notes = list(dict.fromkeys(note for line in lines for note in notes_of(line)))
            headers = [column.title for column in columns]
            tables.append({"run": run, "headers": headers, "rows": rows, "notes": notes})
    return tables


def differences(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Settings that differ between the runs: one row per setting, one cell per run."""
    flat = [_flat(run.settings) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [[key, *(settings.get(key, "–") for settings in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(value: Any, where: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in _flat(part, f"{where}.{key}".lstrip(".")).items()}
    return {where: json.dumps(value, default=str)} if where else {}


def join(values: Any) -> str:
    return ", ".join(f"{value:g}" if number(value) is not None else str(value) for value in values)
