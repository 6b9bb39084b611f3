"""Files that fewstep 0.1.0 wrote (tests/files-0.1.0) still work, with the numbers of that version."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fewstep.cli import main as cli
from fewstep.run.settings import load_run
from tests.support.places import ROOT

FILES = ROOT / "tests" / "files-0.1.0"
MADE_IN = "/home/somebody/fewstep"  # the folder that 0.1.0's files name, which is gone
PICTURES = sorted(FILES.glob("expected/*.npz"))
RUNS = sorted(str(file.relative_to(FILES)) for file in (*FILES.glob("*.yaml"), *FILES.glob("*/run.yaml")))
FURTHER = {
    "teacher": ("--evaluations", 5),
    "song-teacher": ("--evaluations", 5),
    "lora-imported": ("--prompts", "prepared"),
}
TEXT_TO_IMAGE = ("lora", "full", "lora-imported")
NEW_PLACES = {
    "dmd2": ("--teacher.path", "teacher", "--data.path", "images"),
    "teacher": ("--data.path", "images"),
    "lora": ("--teacher.path", "pipeline", "--teacher.prompts", "prepared", "--data.path", "prepared"),
}


@pytest.fixture(autouse=True)
def copy(tmp_path, monkeypatch):
    """A copy of the files as the working folder."""
    shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


def fewstep(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


def differences(old, new, where=""):
    """Return the dotted names of the settings in `old` that `new` lacks or has another value for."""
    if isinstance(old, dict):
        new = new if isinstance(new, dict) else {}
        return [name for key in old for name in differences(old[key], new.get(key, "absent"), f"{where}.{key}")]
    return [] if old == new else [where]


def test_every_kind_of_file_is_here():
    """An empty folder would pass the tests that go through what it holds."""
    assert len(RUNS) == 25 and len(PICTURES) == 9
    methods = [yaml.safe_load((FILES / run).read_text()).get("objective", {}).get("method") for run in RUNS]
    assert {"dmd", "dmd2", "sid", "regression"} <= set(methods)


@pytest.mark.parametrize("file", RUNS)
def test_run_files_are_read_with_the_same_settings(file):
    written = yaml.safe_load(Path(file).read_text())
    assert differences(written, load_run(file).model_dump(mode="json")) == []


@pytest.mark.parametrize("name", NEW_PLACES)
def test_a_run_resumes_to_the_same_weights(name):
    """`dmd2` was stopped by a signal: here it ends as an unbroken run of 0.1.0 did. The others are made longer."""
    if name == "lora":
        pytest.importorskip("diffusers")
    length = {"dmd2": (), "teacher": ("--train.images", 96), "lora": ("--train.images", 48)}[name]
    kind, model = ("pretrain", "teacher") if name == "teacher" else ("distill", "student")
    fewstep(kind, name, *NEW_PLACES[name], *length, "--processes", 1)
    found, expected = load_file(f"{name}/{model}.safetensors"), load_file(f"expected/{name}.safetensors")
    before = load_file(FILES / name / f"{model}.safetensors")
    assert found.keys() == expected.keys() == before.keys()
    moved = max((expected[key] - before[key]).abs().max().item() for key in before)
    assert moved > 1e-4, "the run went on too shortly for its weights to tell"
    for key, value in expected.items():  # another processor rounds otherwise, and Adam's first steps amplify that
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    logged = [json.loads(line) for line in Path(name, "stats.jsonl").read_text().splitlines()]
    images = [line["images"] for line in logged if line["kind"] == "train"]
    assert images == list(range(16, images[-1] + 1, 16)), "each line of the log once, without a gap"


@pytest.mark.parametrize("file", PICTURES, ids=lambda file: file.stem)
def test_models_give_the_same_pictures(file):
    name = file.stem
    if name in TEXT_TO_IMAGE:
        pytest.importorskip("diffusers")
        card = Path(name, "student.json")  # it names the teacher's pipeline
        card.write_text(card.read_text().replace(MADE_IN, str(Path.cwd())))
    fewstep("sample", name, "--seeds", "0-3", *FURTHER.get(name, ()), "--out", "new.npz", "--device", "cpu")
    found, expected = np.load("new.npz"), np.load(file)
    assert found.files == expected.files and len(np.unique(expected["images"])) > 20
    assert np.abs(found["images"].astype(int) - expected["images"]).max() <= 1
    assert all((found[key] == expected[key]).all() for key in expected.files if key != "images")


def test_scores_are_kept_and_measured_again_alike():
    scoring = (
        "eval", "dmd2", "--samples", 16, "--evaluations", 0, "--metrics", "fid", "--extractor", "small",
        "--processes", 1, "--device", "cpu",
    )  # fmt: skip
    old = json.loads(Path("dmd2/results.json").read_text())["rows"]
    fewstep(*scoring, "--reference", "images")
    assert json.loads(Path("dmd2/results.json").read_text())["rows"] == old
    for reference in ("images", "reference.npz"):
        fewstep(*scoring, "--reference", reference, "--out", f"{reference}.json")
        (new,) = json.loads(Path(f"{reference}.json").read_text())["rows"]
        assert new["protocol"] == old[-1]["protocol"]
        assert new["fid"] == pytest.approx(old[-1]["fid"], rel=1e-2)


def test_a_report_shows_old_runs():
    fewstep("report", "dmd2", "sid", "teacher")
    page = Path("dmd2/report.html").read_text()
    rows = json.loads(Path("dmd2/results.json").read_text())["rows"]
    assert len(rows) == 2 and all(f"{row['fid']:.2f}" in page for row in rows)
    (checkpoint,) = Path("dmd2/checkpoints").iterdir()
    assert f"{int(checkpoint.name)} ({100 * int(checkpoint.name) // 96} % of 96)" in page
    assert "cannot be read" not in page


def test_pairs_are_read_and_completed(capsys):
    fewstep("pairs", "dmd.yaml", "--out", "pairs", "--count", 2, "--evaluations", 5, "--processes", 1)
    assert "(2 existed already)" in capsys.readouterr().out
    for name in ("dmd", "regression"):
        fewstep("distill", f"{name}.yaml", "--out", f"new-{name}", "--train.images", 8, "--processes", 1)
        assert "loss/generator_regression" in Path(f"new-{name}/stats.jsonl").read_text()


@pytest.mark.parametrize(("run", "start"), [("sid-from-dmd2", "dmd2"), ("mixture", "mixture")])
def test_a_run_starts_from_an_old_student(run, start):
    place = () if run == "mixture" else ("--teacher.path", "teacher")
    fewstep(
        "distill", f"{run}/run.yaml", *place, "--start-from", start, "--out", "new", "--train.images", 8, "--processes", 1,
        "--optim.generator.lr", 1e-12,
    )  # fmt: skip
    found, given = load_file("new/student.safetensors"), load_file(f"{start}/student.safetensors")
    assert found.keys() == given.keys()
    for key in given:
        torch.testing.assert_close(found[key], given[key], rtol=0, atol=1e-6)


def test_prepared_prompts_and_images_are_accepted_as_they_are(capsys):
    pytest.importorskip("diffusers")
    fewstep("prepare", "pipeline", "--prompts", "prompts.txt", "--images", "captioned", "--out", "prepared")
    assert "3 prompts (3 existed already), 3 images (3 existed already)" in " ".join(capsys.readouterr().out.split())
