"""`fewstep plan` against what an update really allocates and computes, on tiny networks; and on the recipes."""

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers")

from fewstep.cli import main
from fewstep.plan import GPUS, plan
from fewstep.run import load_run
from fewstep.teachers import DiffusersTeacher
from fewstep.trainer import Micro

from .pipelines import tiny_sdxl, tiny_transformer

LORA = {"lora": {"rank": 4}}
MICRO = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    pipeline = tiny_sdxl(root / "sdxl")
    teacher = DiffusersTeacher(path=str(pipeline))
    teacher.prepare(["a cat", "a dog"], root / "prompts", teacher.encoder(), torch.float32)
    return root


def run_of(world, **changes):
    values = {
        "kind": "distill",
        "teacher": {"kind": "diffusers", "path": str(world / "sdxl"), "prompts": str(world / "prompts")},
        "generator": {"timesteps": [999]},
        "train": {"images": 64, "batch_size": MICRO, "precision": "fp32", "gradient_checkpointing": False},
        "evaluation": {"samples": 0},
    }
    changes = {"objective": {"method": "dmd2", "critic_steps": 1, "gan_weight": 0}} | changes
    for key, value in changes.items():
        values[key] = values.get(key, {}) | value
    (world / "run.yaml").write_text(yaml.safe_dump(values))
    return load_run(world / "run.yaml")


def peak(task, position):
    """Bytes that an update allocates at most beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        task.update(position, [Micro(position, MICRO, 0)])
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = most = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


CASES = {
    "copies": {},
    "adapters": {"generator": {"timesteps": [999]} | LORA, "critic": LORA},
    "sid": {"objective": {"method": "sid", "critic_steps": 1}},
    "recomputed": {"train": {"gradient_checkpointing": True}},
}


@pytest.mark.parametrize("name", CASES)
def test_memory_and_work_are_what_an_update_takes(world, tmp_path, name):
    run = run_of(world, **CASES[name])
    found = plan(run)
    task = run.trainer(tmp_path / "run").task
    task.update(0, [Micro(0, MICRO, 0)])  # Adam's moments are made
    predicted = sum(part.size for part in found.parts if "turn" in part.name)
    assert predicted == pytest.approx(peak(task, MICRO), rel=0.3 if name == "recomputed" else 0.15)
    # fused attention on a CPU is not counted by torch
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.update(2 * MICRO, [Micro(2 * MICRO, MICRO, 0)])
    assert found.forward * found.passes * MICRO == pytest.approx(counter.get_total_flops(), rel=0.1)
    student = sum(p.numel() for p in task.nets.generator.parameters())
    critic = sum(p.numel() for p in task.nets.critic.parameters())
    assert (found.parameters["student"][1], found.parameters["fake score"][1]) == (student, critic)
    states = sum(part.size for part in found.parts if "turn" not in part.name)
    base = sum(p.nbytes for p in task.teacher.denoiser.parameters())
    assert states == base + 16 * student + 12 * critic


@pytest.mark.slow
def test_the_one_card_recipe_fits_its_card():
    found = plan(load_run("sdxl/lora-24gb"))
    said = str(found)
    assert "2,567,463,684 of them trained 0" in said and "RTX 4090    24 GiB  fits" in said
    assert 6e12 < found.forward < 7.5e12  # SDXL's UNet at a megapixel
    assert found.hours(GPUS["H100"]) < found.hours(GPUS["A100"])


def test_plan_is_for_text_to_image(capsys, tmp_path):
    folder, _ = tiny_transformer("sd3", tmp_path / "sd3")
    assert main(["plan", "sd35/dmd2-4step-lora", "--teacher.path", str(folder)]) == 1
    assert "StableDiffusion3Pipeline: only pipelines with a UNet" in capsys.readouterr().err
    assert main(["plan", "digits/sid"]) == 1
    assert "`fewstep bench` measures small ones" in capsys.readouterr().err
