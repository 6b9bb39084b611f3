"""What the long scripts found is on record: random changes of every format, and kills of every command that writes."""

import json
from collections import Counter

import pytest

from tests.hostile.subjects import SUBJECTS
from tests.support.places import ROOT

RESULTS = ROOT / "docs" / "results"
FEWER = {"pipeline configurations": 1_500, "pipeline": 200, "single file": 300, "report": 40}
"""Changes of formats whose reader takes long; of the others 20,000."""


def _rows(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def test_every_format_was_changed_at_random():
    pytest.importorskip("lmdb")
    rows = {row["format"]: row for row in _rows("fuzz.jsonl")}
    assert rows.keys() == SUBJECTS.keys()
    for name, row in rows.items():
        assert row["command"].startswith("python tools/fuzz.py") and row["hardware"] and row["date"]
        assert row["faults"] == [] and row["outcomes"]["fault"] == 0, name
        assert sum(row["outcomes"].values()) == row["mutants"] >= FEWER.get(name, 20_000), name


def test_every_command_was_killed_and_its_disk_filled():
    rows = _rows("kills.jsonl")
    kills = Counter(row["name"] for row in rows if "kill" in row)
    ends = Counter(row["name"] for row in rows if row.get("equal") and "end_after_lives" in row)
    disks = Counter(row["name"] for row in rows if "disk_bytes" in row)
    assert sum(kills.values()) >= 170
    assert {name.split(",")[0] for name in ends} == {"pretrain", "pairs", "prepare", "distill", "export", "eval"}
    assert disks.keys() == {"pretrain", "pairs", "prepare", "export", "eval"}  # a full disk of distill: not yet
    # a log of seconds from before the first checkpoint, which the script no longer compares
    assert {row["wrong"].rpartition(": ")[2] for row in rows if row.get("wrong")} <= {"times.jsonl.old"}
