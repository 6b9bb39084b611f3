"""A few random changes of valid files of every format; `tools/fuzz.py` runs thousands, whose log is committed."""

import json
import os
import random
import signal
import sys

import pytest

from tests.hostile import mutants
from tests.hostile.mutants import Subject, fuzz, mutate, scratch

pytest.importorskip("lmdb")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks with limits")

FEW = {"pipeline": 0, "single file": 0, "report": 0, "pipeline configurations": 0, "prompt files": 8}
"""Mutants of formats whose readers are slow; the others get more."""


@pytest.fixture(scope="module")
def subjects():
    from tests.hostile.subjects import SUBJECTS

    return SUBJECTS


def test_mutants_of_every_format(subjects):
    pytest.importorskip("pyarrow")
    found = {}
    for name, subject in subjects.items():
        if count := FEW.get(name, 16):
            for root in scratch():
                found[name] = fuzz(name, subject, count, seed=1, root=root)
    assert {name: tally.faults for name, tally in found.items() if tally.faults} == {}
    assert sum(tally.counts["refused"] for tally in found.values()) > 100, "the changes change nothing"
    assert sum(tally.counts["read"] for tally in found.values()) > 50, "the changes leave nothing whole"


def _fails(kind):
    def read(folder):
        content = (folder / "a.json").read_bytes()
        if content == b'{"a": 1}':
            return
        match kind:
            case "traceback":
                raise KeyError("a")
            case "memory":
                bytearray(2**62)
            case "hang":
                while True:
                    pass
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)

    return read


@pytest.mark.parametrize(
    "kind, said", [("traceback", "KeyError"), ("memory", "MemoryError"), ("hang", "SIGPROF"), ("crash", "SIGKILL")]
)
def test_what_goes_wrong_is_seen(kind, said, monkeypatch):
    monkeypatch.setattr(mutants, "SECONDS", 0.1)
    subject = Subject(lambda folder: (folder / "a.json").write_text('{"a": 1}') and None, lambda: _fails(kind))
    for root in scratch():
        tally = fuzz("a", subject, 3, seed=0, root=root)
    assert tally.counts["fault"] == 3 and all(said in text for text in tally.faults.values()), tally


def test_a_mutant_is_made_from_its_number(tmp_path):
    content = json.dumps({"a": [1, 2, {"b": "c"}], "d": None}).encode()
    made = [[mutate(tmp_path / "a.json", content, random.Random(seed)) for seed in range(50)] for _ in range(2)]
    assert made[0] == made[1] and len(set(made[0])) > 30
