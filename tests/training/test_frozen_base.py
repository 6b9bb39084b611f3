"""Runs of adapters on a quantised network, and with blocks at the host: stopped, resumed, planned, sampled, exported."""

import json

import pytest
import torch
import yaml

pytest.importorskip("diffusers")

from safetensors.torch import load_file

from fewstep.cli.main import main
from fewstep.costs.plan import plan
from fewstep.formats.model import load_generator
from fewstep.networks.lora import merged
from fewstep.run.settings import load_run
from fewstep.students.export import export_student
from fewstep.students.student import find_student, load_student
from fewstep.system.weights import load_weights
from tests.support.pipelines import prepared

LORA = {"lora": {"rank": 2, "alpha": 2, "targets": ["to_q", "to_k", "to_v", "ff.net.2"]}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return prepared("sd3", tmp_path_factory.mktemp("sd3"))[0]


def settings(teacher, quantize="int8", **train):
    return {
        "kind": "distill",
        "teacher": teacher.model_dump(mode="json") | {"dtype": "bfloat16", "quantize": quantize},
        "generator": {"times": [1.0, 0.5]} | LORA,
        "critic": LORA,
        "objective": {"method": "dmd2", "critic_steps": 2, "gan_weight": 0, "guidance": 2.0},
        "optim": {"generator": {"lr": 0.02}, "critic": {"lr": 0.02}},
        "train": {
            "images": 16, "batch_size": 4, "micro_batch": 2, "evaluate_every": None, "checkpoint_every": 8, "ema_half_life": 8,
            "log_every": 4, "precision": "bf16", "device": "cpu", "gradient_checkpointing": True,
        } | train,
        "evaluation": {"samples": 0},
    }  # fmt: skip


def distil(values, root, name="run"):
    (root / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return main(["distill", str(root / f"{name}.yaml"), "--out", str(root / name), "--processes", "1"])


def student(folder):
    return load_weights(folder / "student.safetensors")[0]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    found = [{key: value for key, value in line.items() if "/" in key} for line in lines]
    return [line for line in found if line]  # no line of a run's end


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    assert distil(settings(teacher), root) == 0
    return root / "run"


def test_a_run_that_stopped_is_the_run_and_so_is_one_with_blocks_at_the_host(teacher, run, tmp_path, capsys):
    assert distil(settings(teacher, images=8), tmp_path) == 0
    said = capsys.readouterr().err
    assert "teacher.quantize int8: " in said and "stay as they are" in said
    assert distil(settings(teacher, swap_blocks=1), tmp_path) == 0, "goes on, with a block at the host"
    assert losses(tmp_path / "run") == losses(run)
    found, wanted = student(tmp_path / "run"), student(run)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not any("codes" in name for name in wanted), "adapters alone"
    assert distil(settings(teacher, quantize="float8", images=20), tmp_path) == 1
    assert "teacher.quantize was int8, now float8" in capsys.readouterr().err


def test_whole_students_have_a_teacher_with_blocks_at_the_host(teacher, tmp_path):
    """Gradients run through it (SiD), beside weights in the host's memory too; losses are the same numbers."""
    found = []
    for name, train in (("plain", {}), ("swapped", {"swap_blocks": 2}), ("both", {"swap_blocks": 1, "offload": True})):
        values = settings(teacher, None, images=8, precision="fp32", **train)
        values |= {"generator": {"times": [1.0]}, "critic": {}, "objective": {"method": "sid"}}
        values["teacher"] |= {"dtype": "float32"}
        assert distil(values, tmp_path, name) == 0
        found.append(losses(tmp_path / name))
    assert found[0] == found[1] == found[2] and found[0]


def test_a_student_is_sampled_on_the_base_it_learnt_on_and_merged_into_the_files_weights(teacher, run, tmp_path):
    on_codes = load_student(find_student(run))
    assert on_codes.settings.quantize == "int8"
    whole = load_generator(find_student(run), None, teacher.load().player)[0]
    assert main(["sample", str(run), "--seeds", "0-1", "--out", str(tmp_path / "samples.npz")]) == 0
    export_student(run, tmp_path / "out", dtype=torch.float32)
    exported = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    original = teacher.load().denoiser.net.model.state_dict()
    layer = "transformer_blocks.0.attn.to_q"
    adapter = whole.denoiser.adapters()[f"net.model.{layer}"]
    torch.testing.assert_close(exported[f"{layer}.weight"], original[f"{layer}.weight"] + adapter.product())
    assert merged(whole.denoiser)[f"net.model.{layer}.weight"].dtype == torch.float32
    still = "transformer_blocks.0.ff.net.0.proj.weight"
    assert torch.equal(exported[still], original[still])
    noise = [torch.randn(2, *on_codes.shape) for _ in range(2)]
    cond = on_codes.conditioner.cond(torch.arange(2), 2)
    with torch.no_grad():
        near, wanted = (generator(noise, **cond) for generator in (on_codes.generator, whole))
    assert 0 < (near - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"generator": {"times": [1.0]}}, "teacher.quantize must be null where whole weights are trained, got int8 without generator.lora"),
        ({"critic": {}}, "got int8 without critic.lora"),
        ({"train": {"images": 4, "mesh": {"shard": 2}}}, "must be null for networks that are split over processes"),
        ({"train": {"images": 4, "swap_blocks": 1}}, "swap_blocks must be 0 without gradient_checkpointing, got 1"),
        ({"train": {"images": 4, "swap_blocks": 9, "gradient_checkpointing": True}}, "must be at most the 2 blocks"),
        (
            {"train": {"images": 4, "swap_blocks": 1, "gradient_checkpointing": True, "compile": True}},
            "must be 0 with compile",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_refused(teacher, tmp_path, changes, words, capsys):
    values = settings(teacher) | {key: value for key, value in changes.items() if key != "train"}
    values["train"] = {"batch_size": 4, "device": "cpu"} | changes.get("train", {"images": 4})
    assert distil(values, tmp_path) == 1
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "pipeline, train, words",
    [
        (
            {"quantize": "int8"},
            {},
            "pipeline.quantize must be null, got int8: a pretraining trains the weights themselves",
        ),
        ({}, {"swap_blocks": 1}, "train.swap_blocks must be 0 where all weights are trained, got 1"),
    ],
)
def test_a_pretraining_has_no_frozen_network(teacher, tmp_path, pipeline, train, words, capsys):
    values = {
        "kind": "pretrain", "pipeline": teacher.model_dump(mode="json") | pipeline, "data": {"kind": "digits"},
        "train": {"images": 4, "batch_size": 4, "device": "cpu", "gradient_checkpointing": True} | train,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["pretrain", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "--processes", "1"]) == 1
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("quantize, blocks", [("int8", 0), ("float8", 1), (None, 2)])
def test_the_plan_counts_what_lies_on_the_device(teacher, tmp_path, quantize, blocks):
    values = settings(teacher, quantize, swap_blocks=blocks)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    found = plan(load_run(tmp_path / "run.yaml"))
    task = load_run(tmp_path / "run.yaml").trainer(tmp_path / "run").task
    network = task.teacher.denoiser
    on_host = task.swap.size if task.swap else 0
    total = sum(value.nbytes for value in network.parameters())
    (held,) = [part.size for part in found.parts if part.name.startswith("teacher")]
    assert (held, found.offloading.blocks) == (total - on_host, on_host) and (on_host > 0) is (blocks > 0)
    assert found.parameters["teacher"][0] == sum(p.numel() for p in teacher.load().denoiser.parameters())
    if blocks:
        assert found.offloading.swapped >= 2 * on_host and "blocks at the host: " in str(found)
        assert found.offloading.overlapped > 0 and f"{found.offloading.overlapped:.2f} s at" in str(found)
