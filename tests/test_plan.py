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


@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "pixart"])
def test_transformers_are_planned_too(name, tmp_path):
    """Parameters, conditions and operations of a forward are those of the loaded teacher."""
    folder, _ = tiny_transformer(name, tmp_path / name)
    spec = DiffusersTeacher(path=str(folder))
    run = load_run("sd35/dmd2-4step-lora").model_copy(update={"teacher": spec})
    found = plan(run)
    teacher = spec.load()
    assert found.parameters["teacher"] == (sum(p.numel() for p in teacher.denoiser.parameters()), 0)
    outline, shapes = spec.outline()
    assert outline.net == teacher.student_spec.net
    cond = {key: torch.rand(1, *shape) for key, shape in shapes.items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher.denoiser(torch.randn(1, *teacher.shape), torch.full((1,), 0.5), **cond)
    assert found.forward == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("teacher", [True, False])
def test_split_networks_take_their_share(world, teacher):
    """A mesh of two halves what whole copies take, but not adapters, nor a teacher that stays whole."""
    whole = {part.name: part.size for part in plan(run_of(world), 2).parts}
    mesh = {"train": {"mesh": {"shard": 2, "teacher": teacher}}}
    split = {part.name: part.size for part in plan(run_of(world, **mesh), 2).parts}
    assert split.pop("blocks put together to compute with") > 0
    for name, size in whole.items():
        halved = "activations" not in name and (teacher or "teacher" not in name)
        assert split[name] == pytest.approx(size / 2 if halved else size, rel=1e-3), name
    adapters = plan(run_of(world, **mesh, **CASES["adapters"]), 2)
    alone = plan(run_of(world, **CASES["adapters"]), 2)
    sizes = [[part.size for part in found.parts if "Adam" in part.name] for found in (adapters, alone)]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 2


def test_plan_is_for_text_to_image(capsys, world):
    assert main(["plan", "digits/sid"]) == 1
    assert "`fewstep bench` measures small ones" in capsys.readouterr().err
    run_of(world)
    assert main(["plan", str(world / "run.yaml"), "--train.mesh.shard", "3", "--processes", "4"]) == 1
    assert "train.mesh.shard 3 does not divide 4 processes" in capsys.readouterr().err
