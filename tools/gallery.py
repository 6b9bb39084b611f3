"""Train a healthy run and known faults on the digits, and draw their curves and warnings into docs/health.md.

Command: python tools/gallery.py
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fewstep.report.charts import Chart, Series, save_charts  # noqa: E402
from tests.support.faults import FAULTS, train  # noqa: E402

ONE = ("healthy", "dead-gan", "lagging-critic", "wrong-shift", "wrong-prediction")
TWO = ("healthy-two-steps", "no-backward-simulation")
LENGTH = ("--train.images", "2560", "--train.log-every", "640", "--train.evaluate-every", "640")
PAGE = ROOT / "docs" / "health.md"


def chart(title: str, key: str, names: tuple[str, ...], logs: dict[str, list[dict[str, Any]]], best: float) -> Chart:
    """Chart of one number of the probe in several runs."""
    series = [
        Series(FAULTS[name].title, [(line["images"], line[key]) for line in logs[name] if key in line], look)
        for look, name in enumerate(names)
    ]
    return Chart(title, "", series, lines=[("as the teacher", best)])


def main() -> None:
    logs = {}
    for name in (*ONE, *TWO):
        with tempfile.TemporaryDirectory() as folder:
            logs[name] = train(name, Path(folder), LENGTH)
    for file, charts in (
        ("faults.png", [
            chart("Distance to the teacher's samples", "probe_distance", ONE, logs, 0.0),
            chart("Diversity of one class, in the teacher's", "probe_diversity", ONE, logs, 1.0),
        ]),
        ("two-steps.png", [chart("Distance of training's samples from inference's", "probe_mismatch", TWO, logs, 0.0)]),
    ):  # fmt: skip
        save_charts(charts, ROOT / "docs" / "health" / file)
    rows = ["| run | warnings that it prints |", "| --- | --- |"]
    for name in (*ONE, *TWO):
        codes = dict.fromkeys(line["code"] for line in logs[name] if line["kind"] == "warning")
        shown = ", ".join(f"**`{code}`**" if code == FAULTS[name].code else f"`{code}`" for code in codes)
        rows.append(f"| {FAULTS[name].title} | {shown} |")
    text = PAGE.read_text(encoding="utf-8")
    table = "<!-- gallery -->\n\n" + "\n".join(rows) + "\n\n<!-- end of gallery -->"
    PAGE.write_text(
        re.sub(r"<!-- gallery -->.*<!-- end of gallery -->", lambda _: table, text, flags=re.S), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
