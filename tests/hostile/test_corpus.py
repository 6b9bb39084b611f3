"""Every damaged and hostile file of the corpus, given to what reads it: a result, or one message that names the file."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile.corpus import FORMATS, jobs
from tests.support.places import ROOT

pytest.importorskip("lmdb")


def fault(kind: str, file: Path, outcome: dict) -> str:
    """What is wrong with an outcome; empty for none."""
    said = outcome["said"]
    if "Traceback" in said or outcome["code"] not in (0, 1, 2):
        return f"code {outcome['code']}: {said[-600:]}"
    if kind == "valid":
        return "" if outcome["code"] == 0 else f"a valid file is refused: {said}"
    if outcome["code"] and not (file.name in said or file.parent.name in said):
        return f"the message does not name the file: {said}"
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", said):
        return f"control characters: {said!r}"
    return "" if len(said) < 4000 else f"a message of {len(said)} characters: {said[:300]}"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks with limits")
def test_the_corpus(tmp_path):
    made = list(jobs(tmp_path))
    assert len(made) > 300 and {name for name, *_ in made} == FORMATS.keys()
    lines = "".join(json.dumps(line) + "\n" for *_, line in made)
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.serve"], input=lines, capture_output=True, text=True, cwd=ROOT
    )
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) == len(made), done.stderr[-2000:]
    faults = [
        f"{name}, {kind}: {said}"
        for (name, kind, file, _), outcome in zip(made, outcomes, strict=True)
        if (said := fault(kind, file, outcome))
    ]
    assert not faults, f"{len(faults)} of {len(made)}\n" + "\n".join(faults)
    assert not [path for path in ("/tmp/a-pickle-ran", "/tmp/a-yaml-ran") if Path(path).exists()]
