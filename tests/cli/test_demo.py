"""The demo, short: both lengths of generator, the table and the page."""

import json
import shutil

import pytest

from fewstep.cli import demo
from fewstep.cli.main import main
from fewstep.run.settings import load_run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_students_end_in_one_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "PLACES", {4: tmp_path / "four", 1: tmp_path / "one"})
    short = ["--images", "64", "--samples", "50", "--processes", "1"]
    assert main(["demo", *short]) == 0
    assert "fewstep demo --steps 1" in capsys.readouterr().out
    calls = [row["calls"] for row in json.loads((tmp_path / "four" / "results.json").read_text())["rows"]]
    assert calls == [35, 9, 4, 1, 4]  # the teacher, then the student
    # the other demo's student joins once it is there
    shutil.copytree(tmp_path / "four", tmp_path / "one")
    assert main(["demo", *short]) == 0
    rows = json.loads((tmp_path / "four" / "results.json").read_text())["rows"]
    assert [row["calls"] for row in rows] == [35, 9, 4, 1, 4, 4] and all(row["fid"] > 0 for row in rows)
    assert "2 runs compared" in (tmp_path / "four" / "report.html").read_text()
    assert {steps: len(load_run(recipe).generator.sigmas) for steps, recipe in demo.RECIPES.items()} == {4: 4, 1: 1}
