"""The small text-to-image world, made as its example makes it from a package of drawn emoji, and every recipe on it."""

import importlib.util
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tests.support.places import ROOT

pytest.importorskip("diffusers")

from fewstep.cli.main import main
from fewstep.run.recipes import list_recipes
from fewstep.run.settings import load_run
from fewstep.training.task import Micro

EXAMPLE = ROOT / "examples" / "emoji_world.py"
RECIPES = sorted(name for name in list_recipes() if name.startswith("emoji/"))
NAMES = [f"{size} {shape}" for size in ("BIG", "SMALL") for shape in ("DISC", "SQUARE", "BAR")]


def drawn(name, shade):
    size, shape = name.split()
    picture = Image.new("RGBA", (64, 64))
    near, far = (4, 60) if size == "BIG" else (20, 44)
    box = (near, 28, far, 36) if shape == "BAR" else (near, near, far, far)
    draw = ImageDraw.Draw(picture)
    (draw.ellipse if shape == "DISC" else draw.rectangle)(box, fill=shade)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def package(file, vendor, shade):
    """An npm package as emoji-datasource-... are, with six emoji, one of which a vendor lacks."""
    records = [
        {
            "name": name, "image": f"{number}.png", "category": "Food & Drink", "has_img_google": True,
            "has_img_twitter": number > 0,
        }
        for number, name in enumerate(NAMES)
    ]  # fmt: skip
    with tarfile.open(file, "w:gz") as tar:
        files = {"package/emoji.json": json.dumps(records).encode()}
        files |= {f"package/img/{vendor}/64/{n}.png": drawn(name, shade) for n, name in enumerate(NAMES)}
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("emoji_world", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory, example):
    """A folder with `world` and `runs/emoji-teacher/pipeline`, where all commands of the recipes work."""
    root = tmp_path_factory.mktemp("place")
    for vendor, shade in (("google", (0, 220, 220)), ("twitter", (120, 90, 30))):
        package(root / f"emoji-datasource-{vendor}-16.0.0.tgz", vendor, shade)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        few = ["--train", "60", "--val", "12", "--clip-images", "60", "--vae-images", "60"]
        patch.setattr(sys, "argv", ["emoji_world.py", *few])
        example.main()
        assert main(["prepare", "world/pipeline", "--images", "world/train", "--out", "world/prepared"]) == 0
        # one update of the teacher, and its folder is a pipeline
        short = [
            "--train.images",
            "4",
            "--train.batch-size",
            "4",
            "--train.checkpoint-every",
            "4",
            "--evaluation.samples",
            "0",
        ]
        assert main(["pretrain", "emoji/teacher", "--processes", "1", *short]) == 0
    return root


@pytest.mark.slow
def test_captions_tell_the_truth_and_evaluation_is_unseen(place, example):
    rows = {split: (place / "world" / split / "captions.jsonl").read_text().splitlines() for split in ("train", "val")}
    assert len(rows["train"]) == 60 and len(rows["val"]) == 12
    named = styled = 0
    for split, lines in rows.items():
        for row in map(json.loads, lines):
            words = row["caption"].split(" on a")[0].removeprefix("noto ").removeprefix("twemoji ")
            assert words.upper() in NAMES[1:]
            pixels = np.asarray(Image.open(place / "world" / split / row["file_name"]))
            assert pixels.shape == (32, 32, 3)
            corner = next(name for name, colour in example.BACKGROUNDS.items() if colour == tuple(pixels[0, 0]))
            lighter = bool((np.abs(pixels.astype(int) - (0, 220, 220)).sum(-1) < 30).any())
            style = "noto" if lighter else "twemoji"
            assert example.kept_for_evaluation(words, style, corner) == (split == "val")
            if "background" in row["caption"]:
                named += 1
                assert row["caption"].endswith(f" {corner} background")
            if row["caption"].startswith(("noto", "twemoji")):
                styled += 1
                assert row["caption"].startswith(style)
    assert named and styled


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "emoji/teacher"])
def test_one_full_update(name, place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    run = load_run(name)
    run = run.model_copy(
        update={
            "train": run.train.model_copy(update={"batch_size": 4}),
            "evaluation": run.evaluation.model_copy(update={"samples": 0}),
            "start_from": None,
        }
    )
    task = run.trainer(tmp_path / "run").task
    before = [p.detach().clone() for p in task.nets.generator.parameters() if p.requires_grad]
    for step in range(run.objective.critic_steps + 1):
        stats = task.update((step + 10**6) * 4, [Micro(step * 4, 4, 0)])
        assert all(np.isfinite(float(value)) for key, value in stats.items() if key.startswith("loss/"))
    after = [p for p in task.nets.generator.parameters() if p.requires_grad]
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    text = list_recipes()[name].read_text()
    assert f"# Command:  fewstep distill {name}" in text


@pytest.mark.slow
def test_its_scores_hold_all_that_a_table_needs(place, monkeypatch, tmp_path):
    """The evaluation of the recipes: FID in CLIP's features against pictures kept apart, agreement, diversity."""
    monkeypatch.chdir(place)
    command = ["eval", "runs/emoji-teacher", "--prompts", "world/prepared", "--reference", "world/val"]
    command += [
        "--extractor",
        "clip",
        "--clip",
        "world/judge",
        "--samples",
        "12",
        "--evaluations",
        "2",
        "--guidance",
        "2",
    ]
    assert main([*command, "--processes", "1", "--out", str(tmp_path / "scores.json")]) == 0
    row = json.loads((tmp_path / "scores.json").read_text())["rows"][0]
    assert row["protocol"].startswith("clip-judge-") and {"fid", "clip_score", "retrieval", "diversity"} <= row.keys()
    assert row["name"] == "emoji-teacher, 2 evaluations, guidance 2"


@pytest.mark.slow
def test_the_run_of_a_teacher_answers_to_prompts(place, monkeypatch, tmp_path):
    """What pretraining leaves is a pipeline in the run's folder, which need not be named."""
    monkeypatch.chdir(place)
    for name, model in (("run", "runs/emoji-teacher"), ("pipeline", "runs/emoji-teacher/pipeline")):
        command = ["sample", model, "--prompt", "big disc", "--seeds", "0-1", "--evaluations", "2"]
        assert main([*command, "--out", str(tmp_path / f"{name}.npz")]) == 0
    run, pipeline = (np.load(tmp_path / f"{name}.npz")["images"] for name in ("run", "pipeline"))
    assert run.shape == (2, 32, 32, 3) and np.array_equal(run, pipeline)
