"""Write docs/performance.md's section on GPUs from the findings of `benchmarks/gpu.py`; what was not run is named as such.

python tools/publish_gpu.py findings/findings.jsonl         # adds a copy to docs/results/gpu, then writes the section
python tools/publish_gpu.py                                 # from what docs/results/gpu holds
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.findings import Row, number, read, rows  # noqa: E402
from benchmarks.stages import CASES  # noqa: E402
from benchmarks.stages.variants import VARIANTS  # noqa: E402
from tools.check_markdown import CELL, wrap  # noqa: E402

PAGE, KEPT = ROOT / "docs" / "performance.md", ROOT / "docs" / "results" / "gpu"
BEGIN, END = "<!-- gpu: made by tools/publish_gpu.py -->", "<!-- end of gpu -->"
NOT_YET = "not yet run"
TITLES = {
    "card": "The card and its ceilings",
    "right": "Right: the device's numbers beside the published programs' and a processor's (relative errors)",
    "sdxl": "SDXL at 1024 x 1024, random weights",
    "others": "Other networks at their real sizes",
    "where": "Where the time goes",
    "sampling": "Sampling, without the decoder",
    "levers": "What could make it faster",
    "fashion-mnist": "Fashion-MNIST, whole runs",
}
COLUMNS = (  # heading, number, digits are `number`'s
    ("memory, GiB", "memory"), ("plan", "planned memory"), ("plan's error, %", "plan's error in memory"),
    ("s an iteration", "time"), ("plan", "planned time"), ("plan's error, %", "plan's error in time"),
    ("TFLOP/s", "achieved"), ("of the bf16 product, %", "share of the bf16 product"),
)  # fmt: skip


class PublishError(ValueError):
    """Findings that say nothing about a GPU."""


def main(arguments: list[str] | None = None) -> None:
    """Keep the findings that were given, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("findings", nargs="*", type=Path, help="files to add")
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the section's two marks")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder of all findings that the section is made from")
    options = parser.parse_args(arguments)
    for path in options.findings:
        lines = read(path)
        check(path, lines)
        options.kept.mkdir(parents=True, exist_ok=True)
        (options.kept / f"{lines[0]['date'].replace(':', '')}.jsonl").write_text(path.read_text(encoding="utf-8"))
    kept = sorted(options.kept.glob("*.jsonl")) if options.kept.is_dir() else []
    before, begun, rest = options.page.read_text(encoding="utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise PublishError(f"{options.page} must hold the marks {BEGIN} and {END}")
    made = section([line for path in kept for line in read(path)])
    options.page.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", encoding="utf-8")


def check(path: Path, lines: list[dict[str, Any]]) -> None:
    """Refuse what was measured on a processor, or on tiny networks.

    Raises:
        PublishError: it was, or there is nothing.
    """
    if not lines:
        raise PublishError(f"{path} must hold findings, got none")
    commands = {line["command"] for line in lines if {"--cpu", "--tiny"} & set(line["command"].split())}
    if commands:
        raise PublishError(
            f"{path} must hold findings of a GPU at full size, got those of {', '.join(sorted(commands))}"
        )


def section(lines: list[dict[str, Any]]) -> str:
    """The section's text, a part for each card."""
    plans = [line for line in lines if line["case"].endswith(": plan")]
    measured = [line for line in lines if not line["case"].endswith(": plan")]
    cards = sorted({line["hardware"] for line in measured if line["hardware"] != "unknown"})
    if not cards:
        return f"**{NOT_YET.capitalize()}.**"
    parts = []
    for card in cards:
        own = [line for line in measured if line["hardware"] == card]
        runs = sorted({(line["date"][:10], line["torch"], line["command"]) for line in own})
        parts.append(f"### {card}\n")
        parts += [f"{date}, torch {torch}: `{command}`\n" for date, torch, command in runs]
        parts += [_stage(stage, rows(own + plans, list(TITLES))) for stage in TITLES]
    return wrap("\n".join(parts)).rstrip()


def _stage(stage: str, found: list[Row]) -> str:
    cases = [case.name for case in CASES if case.stage == stage and not case.beside]
    ran = {line["case"] for row in found for line in row.lines if "skipped" not in line}
    table = [row for row in found if row.stage == stage and any(line["case"] in cases for line in row.lines)]
    table = [row for row in table if not all("skipped" in line for line in row.lines if line["case"] in cases)]
    missing = [case for case in cases if case not in ran]
    lines, below = [f"**{TITLES[stage]}**\n"], []
    if any((stage, case) in VARIANTS for case in cases):
        lines += [f"| run | {' | '.join(heading for heading, _ in COLUMNS)} | |", f"|{'---|' * (len(COLUMNS) + 2)}"]
        for row in table:
            values = [row.value(name) for _, name in COLUMNS]
            cells = ["" if value is None else number(value) for value in values]
            remarks = _remarks(row)
            if len(remarks) > CELL:
                below.append(f"* {row.name}: {remarks}")
                remarks = "see below"
            lines.append(f"| {row.name} | {' | '.join(cells)} | {remarks} |")
        lines += [f"| {case} |{' |' * len(COLUMNS)} {NOT_YET} |" for case in missing]
    else:
        lines += ["| | found |", "|---|---|"]
        for row in table:
            cells, remarks = [""], _remarks(row)
            parts = [f"{name} {number(value)} {unit}".strip() for name, (value, unit) in row.numbers.items()]
            if len(remarks) > CELL:
                below.append(f"* {row.name}: {remarks}")
                remarks = "see below"
            for part in [*parts, remarks] if remarks else parts:
                joined = f"{cells[-1]}; {part}".removeprefix("; ")
                cells = [*cells[:-1], joined] if len(joined) <= CELL else [*cells, part]
            lines += [f"| {name} | {cell} |" for name, cell in zip([row.name, *[""] * len(cells)], cells, strict=False)]
        lines += [f"| {case} | {NOT_YET} |" for case in missing]
    return "\n".join([*lines, *([""] if below else []), *below]) + "\n"


def _remarks(row: Row) -> str:
    texts = [*row.notes, *(f"**failed**: {error}" for error in row.errors)]
    return "; ".join(texts).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    try:
        main()
    except PublishError as error:
        sys.exit(str(error))
