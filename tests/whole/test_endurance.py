"""What goes wrong around a run: processes killed in the middle, data that vanishes, a clock that jumps."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.cli.main import main
from fewstep.data import image_files
from fewstep.system.tracking import read_stats
from tests.support.places import ROOT
from tests.support.runs import assert_same_run, environment, fit, sid


@pytest.mark.slow
def test_the_soak_script_finds_nothing_lost(tmp_path):
    """Two deaths of two processes."""
    command = [
        sys.executable,
        str(ROOT / "tools" / "soak.py"),
        "--kills",
        "2",
        "--images",
        "2304",
        "--every",
        "256",
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *_, deaths, verdict = [json.loads(line) for line in (tmp_path / "soak.jsonl").read_text().splitlines()]
    assert deaths["kill"] == 1 and deaths["others_stopped_after"] < 60
    assert verdict["equal_to_an_unbroken_run"] == {"stats.jsonl": True, "student.safetensors": True}


def test_the_long_soak_is_on_record():
    """The committed log is of fifty deaths or more, in all moments, of all victims, and of an equal run at the end."""
    lines = (ROOT / "docs" / "results" / "soak.jsonl").read_text().splitlines()
    about, *deaths, verdict = map(json.loads, lines)
    assert about["command"].startswith("python tools/soak.py") and about["hardware"] and about["date"]
    assert len(deaths) == verdict["kills"] >= 50
    assert {death["moment"] for death in deaths} == {"any", "evaluation", "checkpoint"}
    assert {death["victim"] for death in deaths} == {"all", "worker", "launcher"}
    assert all(death["others_stopped_after"] < 60 for death in deaths)
    reached = [death["checkpoint"] for death in deaths]
    assert reached == sorted(reached), "no checkpoint was lost"
    assert verdict["equal_to_an_unbroken_run"] == {"stats.jsonl": True, "student.safetensors": True}


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of eight pictures that are read when they are needed."""
    monkeypatch.setattr(image_files, "_EAGER_BYTES", 0)
    folder, draw = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for number in range(8):
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.mark.slow
def test_a_picture_that_vanishes_stops_the_run_and_its_return_lets_it_go_on(images, tmp_path, capsys):
    run = tmp_path / "run.yaml"
    run.write_text(
        f"""
kind: pretrain
denoiser: {{net: {{kind: dit, size: 8, channels: 1, patch: 4, width: 16, depth: 1, heads: 2, num_classes: 0}}}}
data: {{kind: folder, path: {images}, channels: 1}}
train: {{images: 160, batch_size: 8, precision: fp32, checkpoint_every: 40, log_every: 40, evaluate_every: null}}
evaluation: {{samples: 0}}
"""
    )
    command = ["pretrain", str(run), "--processes", "1", "--out"]
    assert main([*command, str(tmp_path / "unbroken")]) == 0
    away, seen = images / "5.png", image_files.LazyImages.__getitem__
    batches = iter(range(100))

    def vanishing(self, indices):
        if next(batches) == 12:
            away.rename(tmp_path / "5.png")
        return seen(self, indices)

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_files.LazyImages, "__getitem__", vanishing)
        assert main([*command, str(tmp_path / "broken")]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and "5.png cannot be read" in said
    # without it there are other images, and other batches: the run does not go on with them
    assert main([*command, str(tmp_path / "broken")]) == 1
    assert "was trained on other images" in capsys.readouterr().err
    (tmp_path / "5.png").rename(away)
    assert main([*command, str(tmp_path / "broken")]) == 0
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    """Neither the numbers nor the seconds of a run come from the time of day."""
    fit(sid(), tmp_path / "calm")
    real, jumps = time.time, iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(jumps) * 1e6)
    fit(sid(), tmp_path / "jumping")
    assert_same_run(tmp_path / "jumping", tmp_path / "calm")
    seconds = [line.get("training_seconds", 0) for line in read_stats(Path(tmp_path / "jumping" / "times.jsonl"))]
    assert seconds and all(0 <= value < 300 for value in seconds)
