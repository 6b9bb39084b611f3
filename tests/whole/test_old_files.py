"""Run folders, models, pairs and run files that fewstep 0.1.0 wrote (tests/files-0.1.0) still work, with its numbers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewstep.cli import main as cli
from fewstep.run import specs
from fewstep.run.settings import load_run
from tests.support.places import ROOT

FILES = ROOT / "tests" / "files-0.1.0"
RUNS = [*sorted(FILES.glob("*.yaml")), *sorted(FILES.glob("*/run.yaml"))]


class MeanSquare:
    """A distance of images [B, ...] to [B]."""

    name, device = "mean square", torch.device("cpu")

    def __call__(self, x, y):
        return (x - y).square().flatten(1).mean(1)


@pytest.fixture(autouse=True)
def copy(tmp_path, monkeypatch):
    """A copy of the files as the working folder."""
    shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")


def command(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize("file", RUNS, ids=lambda file: str(file.relative_to(FILES)))
def test_run_files_load(file):
    assert load_run(file).kind in ("distill", "pretrain")


@pytest.mark.parametrize(
    ("kind", "name", "places", "weights"),
    [
        ("distill", "dmd2", ("--teacher.path", "teacher", "--data.path", "images"), "student"),
        ("pretrain", "teacher", ("--data.path", "images"), "teacher"),
    ],
)
def test_a_run_resumes_to_the_same_weights(kind, name, places, weights):
    command(kind, name, *places, "--train.images", 128, "--processes", 1)
    found, expected = load_file(f"{name}/{weights}.safetensors"), load_file(f"expected/{name}-128.safetensors")
    before = load_file(FILES / name / f"{weights}.safetensors")
    assert found.keys() == expected.keys() == before.keys()
    assert any(not torch.equal(found[key], before[key]) for key in found)
    for key, value in expected.items():  # another processor rounds otherwise, and Adam's first steps amplify that
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dmd2", "teacher"])
def test_models_give_the_same_pictures(name):
    calls = ["--evaluations", 5] if name == "teacher" else []
    command("sample", name, "--seeds", "0-7", *calls, "--out", "new.npz")
    found, expected = np.load("new.npz"), np.load(f"expected/{name}.npz")
    assert found.files == expected.files
    for key in expected.files:
        if expected[key].dtype.kind in "iuf":
            assert np.abs(found[key].astype(float) - expected[key].astype(float)).max() <= 1
        else:
            assert (found[key] == expected[key]).all()


def test_results_and_reports():
    rows = json.loads(Path("dmd2/results.json").read_text())["rows"]
    command(
        "eval", "dmd2", "--samples", 16, "--evaluations", 0, "--metrics", "fid", "--extractor", "pixels",
        "--reference", "images", "--processes", 1,
    )  # fmt: skip
    again = json.loads(Path("dmd2/results.json").read_text())["rows"]
    assert [row["name"] for row in again] == [row["name"] for row in rows]  # measured alike: one row each
    assert again[-1]["fid"] == pytest.approx(rows[-1]["fid"], rel=1e-2)
    command("report", "dmd2", "sid", "mixture")
    assert "dmd2" in Path("dmd2/report.html").read_text()


def test_pairs_and_a_mixture(monkeypatch):
    monkeypatch.setattr(specs, "perceptual_for", lambda *_: MeanSquare())  # LPIPS needs weights that do not ship
    command("distill", "dmd.yaml", "--out", "new", "--processes", 1, "--train.images", 16)
    command("distill", "mixture", "--train.images", 96, "--processes", 1)
    assert (Path("new") / "student.safetensors").is_file()
