"""The demo, short: both lengths of generator, the table and the page."""

import json

import pytest

from fewstep.cli import demo
from fewstep.cli.main import main


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_students_end_in_one_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "PLACES", {4: tmp_path / "four", 1: tmp_path / "one"})
    short = ["--images", "64", "--samples", "50", "--processes", "1"]
    assert main(["demo", *short]) == 0
    assert "fewstep demo --steps 1" in capsys.readouterr().out
    calls = [row["calls"] for row in json.loads((tmp_path / "four" / "results.json").read_text())["rows"]]
    assert calls == [35, 9, 4, 1, 4]  # the teacher, then the student
    assert main(["demo", "--steps", "1", *short]) == 0
    rows = json.loads((tmp_path / "one" / "results.json").read_text())["rows"]
    assert [row["calls"] for row in rows] == [35, 9, 4, 1, 1, 4]
    assert all(row["fid"] > 0 for row in rows)
    page = (tmp_path / "one" / "report.html").read_text()
    assert "SiD" in page and "DMD2" in page
