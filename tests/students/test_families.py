"""Students of the families of 2025 and 2026: an update, a few-step sample, and exports that their pipelines draw the same with."""

import re

import pytest
import torch
import yaml
from safetensors import safe_open

pytest.importorskip("diffusers")

import diffusers

from fewstep.cli.main import main
from fewstep.students.export import export_student
from fewstep.students.student import find_student, load_student
from fewstep.system.errors import SettingsError
from fewstep.training import panels
from tests.support.families import NAMES, Made, laid, side, tiny_family, unlaid
from tests.support.readers import COMFYUI_PREFIXES, comfyui_has_place

PROMPTS = ["a cat in a tree", "two dogs"]
TARGETS = {
    "flux2": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out", "linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out"],
    "flux2-dev": ["to_q", "to_k", "to_v", "to_out.0", "linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out"],
    "z-image": ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"],
    "qwen-image": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2"],
    "krea2": ["to_q", "to_k", "to_v", "to_out.0", "ff.gate", "ff.up", "ff.down"],
    "lumina2": ["to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_2"],
    "chroma": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out", "ff.net.0.proj", "ff.net.2", "proj_mlp"],
    "longcat": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out", "ff.net.0.proj", "ff.net.2", "proj_mlp"],
}  # fmt: skip


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """The folder of each family's pipeline, with a folder of prepared prompts."""
    root = tmp_path_factory.mktemp("families")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))

    def make(name):
        folder, out = tiny_family(name, root / name), root / f"{name}-prompts"
        arguments = ["--prompts", str(root / "prompts.txt"), "--out", str(out), "--dtype", "float32"]
        assert main(["prepare", str(folder), *arguments]) == 0
        return folder, out

    return Made(make)


def trained(name, lora, teachers, folder):
    """A run of two updates, the second of the generator's, with gradient checkpointing; guided, if from outside."""
    adapters = {"lora": {"rank": 2, "alpha": 3, "targets": TARGETS[name]}} if lora else {}
    pipeline, prompts = teachers[name]
    run = {
        "kind": "distill",
        "teacher": {"kind": "diffusers", "path": str(pipeline), "prompts": str(prompts), "resolution": side(name)},
        "generator": {"times": [1.0, 0.5]} | adapters,
        "critic": adapters,
        "objective": {"method": "dmd2", "critic_steps": 1, "gan_weight": 0, "guidance": None if name == "flux2-dev" else 2.0},
        "optim": {"generator": {"lr": 0.02}},
        "train": {
            "images": 4, "batch_size": 2, "evaluate_every": None, "threads": 1, "ema_half_life": 0, "precision": "fp32", "gradient_checkpointing": True,
        },
        "evaluation": {"samples": 0},
        "health": {"samples": 0},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "TEACHER_CALLS", 1)
        patch.setattr(panels, "COLUMNS", 1)
        assert main(["distill", str(folder / "run.yaml"), "--out", str(folder / "run"), "--processes", "1"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def adapted(teachers, tmp_path_factory):
    """The run and the export of each family's LoRA student."""
    root = tmp_path_factory.mktemp("adapted")

    def make(name):
        run = trained(name, True, teachers, root / name)
        return run, root / name / "out", export_student(run, root / name / "out", dtype=torch.float32)

    return Made(make)


def drawn(name, pipeline, student, call):
    """The pipeline's picture, and the student's for the same noise."""
    shape = student.spec.net.sample_shape
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(4)
    given = latents if name.startswith("flux2") else laid(name, latents)
    found = pipeline(prompt=PROMPTS[0], latents=given, output_type="pt", **call).images
    torch.manual_seed(4)
    fresh = unlaid(name, torch.randn(laid(name, latents).shape), latents.shape)
    with torch.no_grad():
        samples = student.generator([latents, fresh], **student.conditioner.cond(torch.tensor([0]), 1))
    return found, (student.codec.decode(samples) / 2 + 0.5).clamp(0, 1)


def call_of(card, heading=""):
    """Arguments of the call in a model card, after a line of it."""
    text = card[card.index(heading) :]
    return eval("dict(" + re.search(r'pipeline\(prompt="a prompt", (.*)\)\.images', text).group(1) + ")")


@pytest.mark.parametrize("name", NAMES)
def test_the_exported_folder_draws_the_students_picture(name, adapted):
    run, out, _ = adapted[name]
    student = load_student(find_student(run))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out)
    found, wanted = drawn(name, pipeline, student, call_of((out / "README.md").read_text()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    assert wanted.std() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_the_lora_on_the_base_model_draws_the_students_picture(name, adapted, teachers):
    run, out, _ = adapted[name]
    student = load_student(find_student(run))
    base = diffusers.DiffusionPipeline.from_pretrained(teachers[name][0])
    base.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(out, subfolder="scheduler")
    card = (out / "README.md").read_text()
    call = call_of(card, "LoRA: rank 2")
    before, wanted = drawn(name, base, student, call)
    if name == "longcat":
        assert "pipeline.transformer.load_lora_adapter(" in card
        base.transformer.load_lora_adapter(out, subfolder="lora", weight_name="pytorch_lora_weights.safetensors")
    else:
        base.load_lora_weights(out, subfolder="lora", weight_name="pytorch_lora_weights.safetensors")
    found, _ = drawn(name, base, student, call)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    assert not torch.allclose(before, wanted, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_student_is_trained_and_exported(name, teachers, tmp_path):
    run = trained(name, False, teachers, tmp_path / "whole")
    export_student(run, tmp_path / "out", dtype=torch.float32)
    pipeline, student = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out"), load_student(find_student(run))
    found, wanted = drawn(name, pipeline, student, call_of((tmp_path / "out" / "README.md").read_text()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_comfyui_knows_the_layers_of_a_lora_or_export_says_it_does_not(name, adapted):
    """The rules, with their source, are in tests/support/readers.py."""
    run, out, (_, notes) = adapted[name]
    model = load_student(find_student(run)).net.model
    with safe_open(out / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        paths = {key.rpartition(".lora_")[0] for key in file.keys()}  # noqa: SIM118  (no mapping)
    assert len(paths) > 6
    if name == "lumina2":
        assert any("does not know the layers of a Lumina2Transformer2DModel" in sentence for sentence in notes)
        assert "the LoRA is for diffusers alone" in (out / "README.md").read_text()
    else:
        assert "transformer.{0}" in COMFYUI_PREFIXES[model]
        plain = [path.removeprefix("transformer.") for path in paths]
        assert [path for path in plain if not comfyui_has_place(model, path)] == []


@pytest.mark.parametrize("name", NAMES)
def test_forms_that_no_program_reads_are_refused(name, adapted, tmp_path):
    run, _, _ = adapted[name]
    for form, words in {
        "comfyui": "there is no workflow for a .* here",
        "unet": "unet is for networks whose file ComfyUI loads, got a",
        "checkpoint": "checkpoint is for Stable Diffusion 1 and SDXL, got a",
    }.items():
        with pytest.raises(SettingsError, match=words):
            export_student(run, tmp_path / "out", [form])


@pytest.mark.parametrize("name", NAMES)
def test_a_student_is_sampled_by_the_command(name, adapted, tmp_path):
    run, _, _ = adapted[name]
    assert main(["sample", str(run), "--prompt", "a cat", "--seeds", "0", "--out", str(tmp_path / "s.png")]) == 0
    assert (tmp_path / "s.png").stat().st_size > 100
