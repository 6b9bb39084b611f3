"""`fewstep plan` against what an update really allocates and computes, on tiny networks; and on the recipes."""

import json
from importlib import resources

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fewstep.system.errors import SettingsError

pytest.importorskip("diffusers")


import fewstep.run.specs
from fewstep.cli.main import main
from fewstep.costs.machines import GPUS, Messages, Step
from fewstep.costs.plan import plan
from fewstep.evaluation.perceptual import LPIPS
from fewstep.methods import Objective
from fewstep.methods.pairs import make_pairs
from fewstep.methods.shipped import DMD2
from fewstep.run.settings import load_run
from fewstep.system.distributed import MeshSpec
from fewstep.system.weights import load_weights
from fewstep.teachers import DiffusersTeacher
from fewstep.training.task import Micro
from tests.support.families import NAMES, side, tiny_family
from tests.support.pipelines import tiny_sdxl, tiny_transformer

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
    "activations": {"train": {"recompute_activations": True}},
    "offloaded": {"train": {"offload": True}},
    "quantised": {"generator": {"timesteps": [999]} | LORA, "critic": LORA, "teacher": {"quantize": "int8"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_memory_and_work_are_what_an_update_takes(world, tmp_path, name):
    run = run_of(world, **CASES[name])
    found = plan(run)
    task = run.trainer(tmp_path / "run").task
    task.update(0, [Micro(0, MICRO, 0)])  # Adam's moments are made
    predicted = sum(part.size for part in found.parts if "update" in part.name)
    assert predicted == pytest.approx(peak(task, MICRO), rel=0.3 if name in ("recomputed", "activations") else 0.15)
    # fused attention on a CPU is not counted by torch
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.update(2 * MICRO, [Micro(2 * MICRO, MICRO, 0)])
    assert found.work.iteration * MICRO == pytest.approx(counter.get_total_flops(), rel=0.01)
    student = sum(p.numel() for p in task.nets.generator.parameters())
    critic = sum(p.numel() for p in task.nets.critic.parameters())
    assert (found.parameters["student"][1], found.parameters["fake score"][1]) == (student, critic)
    states = sum(part.size for part in found.parts if "update" not in part.name)
    base = sum(p.nbytes for p in task.teacher.denoiser.parameters())
    if name == "offloaded":
        assert states == base + 4 * student + 4 * critic
        assert found.offloading.memory == 16 * student + 12 * critic + 4 * max(student, critic)  # gradients of a turn
        return
    assert states == base + 16 * student + 12 * critic
    assert found.offloading.seconds == found.offloading.memory == 0


@pytest.mark.slow
@pytest.mark.parametrize(("method", "tiny"), [("dmd", False), ("regression", True)])
def test_pairs_take_a_decoder_and_lpips(world, tmp_path, monkeypatch, method, tiny):
    """What VAE and VGG keep for the backward pass is most of it."""
    from diffusers import AutoencoderTiny

    monkeypatch.setattr(LPIPS, "size", 48)  # not 224, which takes a minute here
    monkeypatch.setattr(
        fewstep.run.specs, "perceptual_for", lambda shape, name, device: LPIPS(device, pretrained=False)
    )
    small = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1))
    AutoencoderTiny(**small, num_decoder_blocks=(1, 1)).save_pretrained(tmp_path / "tiny-vae")
    teacher = {"tiny_vae": str(tmp_path / "tiny-vae")} if tiny else {}
    objective = {"method": method, "guidance": 2.0}
    if method == "dmd":
        objective["critic_noise"] = {"kind": "uniform", "low": 0.0, "high": 1.0}
    run_of(world)  # that its defaults are not mixed with this objective's
    run = load_run(world / "run.yaml").model_copy(
        update={
            "teacher": DiffusersTeacher(path=str(world / "sdxl"), prompts=world / "prompts", **teacher),
            "objective": Objective.model_validate(objective),
            "pairs": tmp_path / "pairs",
        }
    )
    make_pairs(run.teacher.load(), tmp_path / "pairs", MICRO, evaluations=1, guidance=2.0)
    found = plan(run)
    task = run.trainer(tmp_path / "run").task
    task.update(0, [Micro(0, MICRO, 0)])
    predicted = sum(part.size for part in found.parts if "update" in part.name)
    assert predicted == pytest.approx(peak(task, MICRO), rel=0.2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.update(2 * MICRO, [Micro(2 * MICRO, MICRO, 0)])
    assert found.work.iteration * MICRO == pytest.approx(counter.get_total_flops(), rel=0.01)
    shard = load_weights(tmp_path / "pairs" / "pairs-00000.safetensors")[0]
    assert found.pair * MICRO == shard["z"].nbytes + shard["y"].nbytes
    networks = (task.nets.perceptual.perceptual.net, run.teacher.outline_decoder())
    size = sum(value.nbytes for net in networks for value in (*net.parameters(), *net.buffers()))
    assert {part.name: part.size for part in found.parts}["perceptual distance and decoder"] == size


@pytest.mark.slow
def test_a_lora_of_twenty_billion_weights_fits_one_small_card(tmp_path):
    """FLUX.1's shape with 32 and 64 blocks: in int8, half of them at the host, as docs/text_to_image.md says."""
    parts = json.loads((resources.files("fewstep") / "assets" / "pipelines" / "flux.json").read_text())
    parts["transformer"] |= {"num_layers": 32, "num_single_layers": 64}
    for name in ("transformer", "vae"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(parts[name]))
    kinds = {name: ["diffusers", parts[name]["_class_name"]] for name in ("transformer", "vae")}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"} | kinds))
    run = load_run("flux/lora-24gb")
    teacher = run.teacher.model_copy(update={"path": str(tmp_path)})
    one = run.generator.model_copy(update={"times": (1.0,)})  # fewer calls take as much memory
    run = run.model_copy(update={"teacher": teacher, "generator": one})
    assert run.teacher.quantize == "int8"
    found = plan(run.model_copy(update={"train": run.train.model_copy(update={"swap_blocks": 48})}))
    assert found.parameters["teacher"][0] == pytest.approx(20.0e9, rel=0.001)
    assert found.memory / 2**30 == pytest.approx(22.0, abs=0.1) and found.fits(GPUS["RTX 4090"])
    assert found.offloading.blocks / 2**30 == pytest.approx(9.3, abs=0.1)


@pytest.mark.parametrize("name", ["sd3", "sd35", "flux", "sana", "pixart"])
def test_transformers_are_planned_too(name, tmp_path):
    """Parameters, conditions and operations of a forward are those of the loaded teacher."""
    folder, _ = tiny_transformer(name, tmp_path / name)
    spec = DiffusersTeacher(path=str(folder))
    run = load_run("sd35/dmd2-4step-lora")
    objective = run.objective.model_copy(update={"guidance": None})  # FLUX is not guided from outside
    run = run.model_copy(update={"teacher": spec, "objective": objective})
    found = plan(run)
    teacher = spec.load()
    assert found.parameters["teacher"] == (sum(p.numel() for p in teacher.denoiser.parameters()), 0)
    outline, shape = spec.outline()
    assert outline.net == teacher.student_spec.net
    cond = {key: torch.rand(value.shape) for key, value in shape.items()}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        teacher.denoiser(torch.randn(1, *teacher.shape), torch.full((1,), 0.5), **cond)
    assert found.work.forward == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_later_families_are_planned_or_refused(name, tmp_path):
    spec = DiffusersTeacher(path=str(tiny_family(name, tmp_path / name)), resolution=side(name))
    run = load_run("sd35/dmd2-4step-lora")
    objective = run.objective.model_copy(update={"guidance": None})
    one = run.generator.model_copy(update={"times": (1.0,)})
    run = run.model_copy(update={"teacher": spec, "objective": objective, "generator": one})
    if name == "lumina2":  # whose network asks for the lengths of the texts
        with pytest.raises(SettingsError, match=r"without values to be planned.* Try: `fewstep bench`"):
            plan(run)
        return
    found = plan(run)
    assert found.parameters["teacher"] == (sum(p.numel() for p in spec.load().denoiser.parameters()), 0)
    assert found.work.forward > 0


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [True, False])
def test_split_networks_take_their_share(world, teacher):
    """A mesh of two halves what whole copies take, but not adapters, nor a teacher that stays whole."""
    whole = {part.name: part.size for part in plan(run_of(world), 2).parts}
    mesh = {"train": {"mesh": {"shard": 2, "teacher": teacher}}}
    split = {part.name: part.size for part in plan(run_of(world, **mesh), 2).parts}
    assert split.pop("blocks put together to compute with") > 0
    for name, size in whole.items():
        if "activations" in name:  # the most of them, whenever that is: gradients leave as they arrive
            assert size <= split[name] < 1.5 * size
        else:
            assert split[name] == pytest.approx(size / 2 if teacher or "teacher" not in name else size, rel=1e-3), name
    if not teacher:
        with pytest.raises(SettingsError, match="must be true if student and fake score are adapters"):
            plan(run_of(world, **mesh, **CASES["adapters"]), 2)
        return
    adapters = plan(run_of(world, **mesh, **CASES["adapters"]), 2)
    alone = plan(run_of(world, **CASES["adapters"]), 2)
    sizes = [[part.size for part in found.parts if "Adam" in part.name] for found in (adapters, alone)]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 2


def test_a_native_teacher_is_planned_as_it_is():
    """Parameters, passes and checkpoint of the digits' SiD run."""
    run = load_run("digits/sid")
    found, teacher = plan(run, 2), run.teacher.load()
    count = sum(p.numel() for p in teacher.denoiser.parameters())
    assert found.parameters["student"] == (count, count)
    assert found.work.passes == pytest.approx(10, rel=0.001)
    assert found.messages == (Messages.averaging(4 * 2 * count, 2),)  # student and fake score, once each
    assert found.checkpoint == (4 + 8 + 4 + 4 + 8) * count


def test_messages_by_hand():
    """Two machines of eight: 8 GB averaged; and split over eight, then averaged over the two."""
    assert Messages.averaging(8e9, 16) == Messages(far=15e9)
    assert Messages.averaging(8e9, 4) == Messages(near=12e9)
    assert Messages.splitting(8e9, 4e9, shard=8, replicate=2) == Messages(near=10.5e9, far=4e9, hidden=True)
    assert Messages.splitting(8e9, 4e9, shard=4, replicate=2) == Messages(near=9e9 + 1e9, hidden=True)
    assert Messages.splitting(8e9, 4e9, shard=16, replicate=1) == Messages(far=11.25e9, hidden=True)
    assert Messages.splitting(0, 4e9, shard=16, replicate=2).far == 3.75e9 + 2e9  # a machine has half of the parts
    card = GPUS["A100"]
    second, hidden = Messages(near=0.7 * 300e9), Messages(near=0.7 * 300e9, hidden=True)
    together = Step.on(card, 0.4 * 312e12, [second])
    assert (together.computing, together.messages, together.seconds) == pytest.approx((1, 1, 2))
    assert Step.on(card, 0.4 * 312e12, [hidden]).seconds == pytest.approx(1)
    assert Step.on(card, 0.4 * 312e12, [second, hidden]).seconds == pytest.approx(2)
    assert Step.on(card, 0.4 * 312e12, [], bf16=False).seconds == pytest.approx(2)
    assert Step.on(card, 0.4 * 312e12, [], bf16=False, exact=True).seconds == pytest.approx(16)


def test_float32_is_planned_at_its_own_rate():
    """`fp32` is float32 throughout: an A100 multiplies it at a sixteenth of bfloat16's rate."""
    run = load_run("digits/sid")
    seconds = {}
    for precision in ("bf16", "fp32"):
        changes = {"train": run.train.model_copy(update={"precision": precision})}
        found = plan(run.model_copy(update=changes))
        seconds[precision] = found.step(GPUS["A100"]).computing
    assert seconds["fp32"] == pytest.approx(16 * seconds["bf16"]) and "TFLOP/s (float32)" in str(found)


def test_splitting_sends_what_the_networks_weigh(world):
    """Each block is put together as often as it runs, forwards and backwards, and the rest (3 %) once; gradients are summed once."""
    found = plan(run_of(world, train={"mesh": {"shard": 2}}), 2)
    count, fake = found.parameters["student"][0], found.parameters["fake score"][0]
    # one step, one critic update each: student 1 + 1, fake score 1 + 2, teacher 1; float32; gradients of both players
    sent = (4 * (2 + 3 + 1) * count + 4 * (count + fake)) / 2
    none, split = found.messages
    assert none.near == none.far == split.far == 0 and split.hidden and split.near == pytest.approx(sent, rel=0.03)
    # measured with two processes (bytes of all gathers over those of a network, one update): 10.5 with a GAN, 8.96 if the head
    # shares a forward
    for share, gathers in ((False, 10.5), (True, 8.96)):
        gan = {"method": "dmd2", "critic_steps": 1, "gan_weight": 1e-3, "share_forward": share}
        run = load_run("digits/sid").model_copy(update={
            "objective": DMD2(**{k: v for k, v in gan.items() if k != "method"}, gan_noise=DMD2().critic_noise),
            "train": load_run("digits/sid").train.model_copy(update={"mesh": MeshSpec(shard=2), "precision": "fp32"}),
        })  # fmt: skip
        found = plan(run, 2)
        count, fake = found.parameters["student"][0], found.parameters["fake score"][0]
        assert (found.messages[1].near * 2 - 4 * (count + fake)) / (4 * count) == pytest.approx(gathers, rel=0.05)


@pytest.mark.parametrize(
    ("objective", "measured"),
    [("sid", 14.96), ("dmd2", 17.49), ("dmd2 share", 14.84)],  # `fewstep bench` with --train.gradient-checkpointing
)
def test_recomputed_blocks_are_counted_wherever_gradients_pass(objective, measured):
    run = load_run("digits/sid")
    changes = {"train": run.train.model_copy(update={"gradient_checkpointing": True})}
    if objective != "sid":
        share = objective.endswith("share")
        changes["objective"] = DMD2(critic_steps=1, share_forward=share, gan_noise=DMD2().critic_noise)
    else:
        changes["objective"] = run.objective.model_copy(update={"share_rollout": False})
    assert plan(run.model_copy(update=changes)).work.passes == pytest.approx(measured, rel=0.01)


def test_offloading_by_hand(world, capsys):
    """The critic is updated five times as often as the student."""
    run = run_of(
        world,
        train={"offload": True, "precision": "bf16"},
        objective={"method": "dmd2", "critic_steps": 5, "gan_weight": 0},
    )
    found = plan(run)
    student, fake = found.parameters["student"][1], found.parameters["fake score"][1]
    sizes = {part.name: part.size for part in found.parts}
    assert sizes["student: weights, bfloat16"] == 2 * student and sizes["fake score: weights, bfloat16"] == 2 * fake
    assert not [name for name in sizes if "moments" in name or "averaged" in name or "copies" in name]
    assert student == fake and [size for name, size in sizes.items() if "gradients" in name] == [2 * fake]
    assert found.offloading.memory == found.checkpoint + 6 * fake
    assert found.offloading.moved == pytest.approx(4 * (student / 5 + fake))
    assert found.offloading.touched == pytest.approx(60 * student / 5 + 48 * fake)
    seconds = found.offloading.moved / 20e9 + found.offloading.touched / 100e9
    step = found.step(GPUS["A100"])
    assert step.seconds == pytest.approx(step.computing + seconds)
    plain = plan(
        run_of(world, train={"precision": "bf16"}, objective={"method": "dmd2", "critic_steps": 5, "gan_weight": 0})
    )
    assert found.checkpoint == plain.checkpoint  # what is written is float32 wherever it rests
    assert main(["plan", str(world / "run.yaml"), "--train.offload", "--processes", "2"]) == 1
    assert "`train.offload` must be false with several processes" in capsys.readouterr().err
    assert main(["plan", str(world / "run.yaml"), "--train.offload", "--optim.critic.kind", "adamw8bit"]) == 1
    assert "Try: kind adamw" in capsys.readouterr().err


def test_what_cannot_be_planned(capsys, world):
    assert main(["plan", "digits/sid", "--processes", "3"]) == 1
    assert (
        "`train.batch_size` must be a multiple of 3 processes x micro-batches of 21, got 64" in capsys.readouterr().err
    )
    run_of(world)
    assert main(["plan", str(world / "run.yaml"), "--train.mesh.shard", "3", "--processes", "4"]) == 1
    assert "`train.mesh` must divide 4 processes, got shard 3" in capsys.readouterr().err
