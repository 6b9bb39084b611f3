"""tools/stacked_loras.py: a style is trained, stacked on a student's adapters at several strengths, and written into its card."""

import json

import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("diffusers")

from fewstep.cli.main import main
from fewstep.formats.lora_reading import read_lora
from fewstep.students.export import export_student
from tests.support.pipelines import tiny_sdxl
from tools import stacked_loras

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of adapters and a style for its teacher."""
    root = tmp_path_factory.mktemp("world")
    tiny_sdxl(root / "sdxl")
    (root / "prompts.txt").write_text("a cat\na dog\n")
    (root / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (250, 20 * number, 30)).save(root / "images" / f"{number}.png")
        (root / "images" / f"{number}.txt").write_text("a cat")
    lora = {"lora": {"rank": 2, "alpha": 2}}
    run = {
        "kind": "distill",
        "teacher": {"kind": "diffusers", "path": str(root / "sdxl"), "prompts": str(root / "prepared")},
        "generator": {"timesteps": [999, 499]} | lora,
        "critic": lora,
        "objective": {"method": "dmd2", "critic_steps": 1, "gan_weight": 0, "guidance": 2.0},
        "optim": {"generator": {"lr": 0.02}},
        "train": {"images": 4, "batch_size": 4, "evaluate_every": None, "ema_half_life": 0, "precision": "fp32", "device": "cpu"},
        "evaluation": {"samples": 0},
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(run))
    prepare = [
        "prepare",
        str(root / "run.yaml"),
        "--prompts",
        str(root / "prompts.txt"),
        "--images",
        str(root / "images"),
    ]
    assert main([*prepare, "--out", str(root / "prepared")]) == 0
    assert main(["distill", str(root / "run.yaml"), "--out", str(root / "run"), "--processes", "1"]) == 0
    few = ["--rank", "2", "--updates", "2", "--batch", "2", "--lr", "0.1", "--device", "cpu"]
    stacked_loras.main(
        ["train", str(root / "prepared"), "--run", str(root / "run"), "--out", str(root / "style.safetensors"), *few]
    )
    return root


def test_the_style_is_a_lora_of_the_teacher(world):
    student = stacked_loras.open_run(world / "run", CPU)
    network = student.generator.denoiser.base.net.model
    factors = read_lora(world / "style.safetensors").for_network(network)
    assert len(factors) == len(student.generator.denoiser.adapters())
    assert any(change.product().abs().max() > 0 for change in factors.values())


def test_a_sweep_leaves_the_weights_alone_and_its_ends_are_known(world):
    student = stacked_loras.open_run(world / "run", CPU)
    base = student.generator.denoiser.base
    before = {name: value.clone() for name, value in base.state_dict().items()}
    scales = [adapter.scale for adapter in student.generator.denoiser.adapters().values()]
    rows = stacked_loras.sweep(student, world / "style.safetensors", [0.0, 1.0], [0.0, 1.0], 2.0, 2, 2, 2, CPU)
    assert [(row["student"], row["style"]) for row in rows] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert rows[1]["distance"] == pytest.approx(1.0), "the unit"
    assert rows[0]["follows"] != rows[0]["follows"] and rows[2]["follows"] != 0
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert scales == [adapter.scale for adapter in student.generator.denoiser.adapters().values()]


def test_a_sampler_that_is_the_teacher_follows_it_whole(world, monkeypatch):
    """With the teacher's pictures in the student's place the numbers are 1 and 0."""
    student = stacked_loras.open_run(world / "run", CPU)
    own = stacked_loras.described

    def teacher_alone(student, denoiser, *sizes):
        return own(student, denoiser or student.generator.denoiser.base, *sizes)

    monkeypatch.setattr(stacked_loras, "described", teacher_alone)
    monkeypatch.setattr(type(student.teacher), "guided", lambda self, scale: self.denoiser)
    rows = stacked_loras.sweep(student, world / "style.safetensors", [1.0], [0.5, 1.0], None, 1, 2, 2, CPU)
    for row in rows:
        assert row["follows"] == pytest.approx(1.0, rel=1e-4)


def test_the_card_gets_the_table_once(world, tmp_path, capsys):
    export_student(world / "run", tmp_path / "out", ["lora"])
    card = tmp_path / "out/README.md"
    before = card.read_text()
    sizes = [
        "--prompts",
        "1",
        "--seeds",
        "2",
        "--calls",
        "2",
        "--students",
        "1",
        "--styles",
        "0",
        "1",
        "--device",
        "cpu",
    ]
    for _ in range(2):
        stacked_loras.main(
            ["sweep", str(world / "style.safetensors"), "--run", str(world / "run"), "--out", str(tmp_path / "s.json"),
             "--card", str(card), *sizes]
        )  # fmt: skip
    text = card.read_text()
    assert text.startswith(before.rstrip()) and text.count("## Beside another LoRA") == 1
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert f"| 1 | 1 | {rows[1]['follows']:.2f} | {rows[1]['distance']:.2f} |" in text and "| 1 | 0 |  | 1.00 |" in text


def test_other_runs_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no few-step student"):
        stacked_loras.open_run(tmp_path, CPU)
