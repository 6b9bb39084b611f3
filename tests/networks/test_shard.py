"""Networks split over processes (FSDP2, on CPUs with gloo): the numbers of one process, and of any other arrangement."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from fewstep.cli.main import main
from fewstep.data import Digits
from fewstep.formats.model import DenoiserSpec, save_denoiser
from fewstep.methods import DMD2
from fewstep.networks import DiTSpec, UNetSpec
from fewstep.networks.lora import LoraSpec
from fewstep.networks.placement import shard
from fewstep.system import distributed
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.distributed import MeshSpec
from fewstep.system.errors import SettingsError
from fewstep.system.tracking import read_stats
from fewstep.system.weights import load_weights
from fewstep.teachers import NativeTeacher
from fewstep.training.distill import Distillation, Setup
from fewstep.training.task import Micro
from tests.support.places import ROOT
from tests.support.processes import ranks
from tests.support.runs import BATCH, STOP, assert_same_run, at, dmd2, fit, optim, pretraining, sid, train_spec

NETS = {
    "dit": DiTSpec(size=8, channels=1, patch=4, width=16, depth=2, heads=2, num_classes=10),
    "unet": UNetSpec(size=8, channels=1, widths=(8, 16), num_classes=10),
}
PAIRS = ("sid", "dmd2", "dit", "lora")  # what is run on two pairs of processes too
LENGTH = 48  # images: six updates of eight, a generator update in every second one
LONGER = 120  # on points: past `STOP`, two evaluations, two checkpoints, learning rates that fall


def on_network(kind: str, folder: Path, lora: bool = False, **train) -> Distillation:
    """DMD2 with a GAN in two steps on a real network, whose head reads a block; with `lora`, all on one backbone."""
    file = Path(folder) / f"{kind}.safetensors"
    teacher = NativeTeacher(path=str(file)).load()
    adapters = (
        LoraSpec(rank=2, alpha=2, targets=("qkv", "proj", "mlp.0", "mlp.2", "conv1", "conv2", "out")) if lora else None
    )
    times = tuple(teacher.denoiser.schedule.time(torch.tensor([20.0, 1.0], dtype=torch.float64)).tolist())
    settings = dict(images=LENGTH, ema_half_life=40, evaluate_every=None, log_every=LENGTH) | train
    return Distillation(Setup(
        teacher, times, DMD2(critic_steps=2, guidance=2.0), train_spec(**settings), optim(), optim(), Digits().load(),
        generator_lora=adapters, critic_lora=adapters,
    ))  # fmt: skip


def write_teachers(folder: Path) -> None:
    for kind, net in NETS.items():
        torch.manual_seed(0)
        spec = DenoiserSpec(net=net)
        denoiser = spec.build()
        for parameter in denoiser.parameters():  # nothing is left at its initial zero
            parameter.data += 0.05 * torch.randn_like(parameter)
        save_denoiser(folder / f"{kind}.safetensors", denoiser, spec, {})


def cases(folder: Path) -> dict:
    """Runs by name: a function of the mesh and further settings."""
    return {
        "sid": lambda **train: sid(images=LONGER, **train),
        "dmd2": lambda **train: dmd2(images=LONGER, **train),
        "pretraining": lambda **train: pretraining(images=LONGER, **train),
        "dit": lambda **train: on_network("dit", folder, **train),
        "unet": lambda **train: on_network("unet", folder, gradient_checkpointing=True, **train),
        "lora": lambda **train: on_network("dit", folder, lora=True, **train),
    }


def split_runs(place: Path, shard: int, micro: int) -> None:
    """In each process: every case in its own folder, and runs that stop and go on."""
    mesh = MeshSpec(shard=shard)
    with distributed.process_group():
        out = place / f"{distributed.world_size()}-{shard}"
        for name, case in cases(place).items():
            if distributed.world_size() == 4 and name not in PAIRS:
                continue
            task = case(mesh=mesh, micro_batch=micro)
            assert task.sharded == (shard > 1)
            fit(task, out / name)
        if distributed.world_size() == 2:
            stop(out / "stopped", shard, micro)
            fit(dmd2(images=LONGER, mesh=mesh, micro_batch=micro), out / "stopped")
            stop(place / "half", shard, 2)
        else:
            fit(dmd2(images=LONGER, mesh=mesh, micro_batch=micro), out / "rest")


def stop(folder: Path, shard: int, micro: int) -> None:
    """The first part of a run, in each process: a signal to one of them stops all."""
    task = dmd2(images=LONGER, mesh=MeshSpec(shard=shard), micro_batch=micro)
    if distributed.rank() == distributed.world_size() - 1:
        at(STOP - BATCH, task, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt, match=f"{STOP} images"):
        fit(task, folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`one/NAME` from one process, `2-2/NAME` from two that share each network, `4-2/NAME` from two such pairs.

    `half` is a run that the two left half done, in micro-batches of two, and `4-2/rest` what the pairs made of it.
    """
    folder = tmp_path_factory.mktemp("shards")
    write_teachers(folder)
    for name, case in cases(folder).items():
        fit(case(micro_batch=4), folder / "one" / name)
    ranks(split_runs, folder, 2, 4)
    shutil.copytree(folder / "half", folder / "4-2" / "rest")
    ranks(split_runs, folder, 2, 2, count=4)
    return folder


def state_of(folder: Path) -> dict:
    return Checkpoints(folder / "checkpoints").load()["task"]


def assert_close(actual: dict, expected: dict, atol: float) -> None:
    for part in expected:
        if "optimizer" in part:
            for number, state in expected[part]["state"].items():
                for key, value in state.items():
                    torch.testing.assert_close(
                        actual[part]["state"][number][key], value, rtol=1e-4, atol=atol, msg=f"{part} {number} {key}"
                    )
        else:
            assert list(actual[part]) == list(expected[part])
            for key, value in expected[part].items():
                if key.endswith(
                    "qkv.bias"
                ):  # that of the keys has no gradient: Adam makes steps of its rounding errors
                    continue
                torch.testing.assert_close(
                    actual[part][key],
                    value,
                    rtol=0,
                    atol=atol,
                    msg=lambda text, key=key, part=part: f"{part} {key}: {text}",
                )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sid", "dmd2", "pretraining", "dit", "unet", "lora"])
def test_split_networks_train_as_one_process_does(place, name):
    """Weights, averages, optimizer states, the file for people, logged losses and gradient norms after a whole run."""
    one, split = place / "one" / name, place / "2-2" / name
    assert_close(state_of(split), state_of(one), 1e-5)
    file = next(one.glob("*.safetensors")).name
    mine, whole = (load_weights(folder / file)[0] for folder in (split, one))
    assert mine.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=1e-5)
    lines = [[line for line in read_stats(f / "stats.jsonl") if line["kind"] == "train"] for f in (split, one)]
    for a, b in zip(*lines, strict=True):
        names = [key for key in b if key.startswith(("loss", "gradient_norm"))]
        logged = {key: b[key] for key in names}
        assert names and {key: a[key] for key in names} == pytest.approx(logged, rel=1e-3, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_two_pairs_train_as_one_process_does(place, name, tmp_path):
    """replicate 2 x shard 2 against one process with the same micro-batches of two."""
    fit(cases(place)[name](micro_batch=2), tmp_path / "one")
    assert_close(state_of(place / "4-2" / name), state_of(tmp_path / "one"), 1e-5)


def narrow_runs(place: Path) -> None:
    """In each of two processes that share every network: runs in bfloat16, drawn on the way; and what leaks into the critic."""
    split = dict(mesh=MeshSpec(shard=2), micro_batch=2)
    with distributed.process_group():
        fit(pretraining(images=LONGER, precision="bf16", **split), place / "narrow" / "pretraining")
        fit(on_network("dit", place, precision="bf16", evaluate_every=24, **split), place / "narrow" / "dit")
        task = on_network("dit", place, **split)
        task.picture(0, place / "narrow")  # forwards without backward
        task._generator_update(0, [Micro(2 * i, 2, 0) for i in range(2)], 1, {})
        assert all(p.grad is None for p in task.nets.critic.parameters()), "the generator's turn trained the critic"
        head_within_a_block(place)


def head_within_a_block(place: Path) -> None:
    """A GAN head that reads the middle of a block (SD3's feed-forward): gradients on the samples are those of the whole network."""
    from tests.support.pipelines import prepared

    teacher = prepared("sd3", place / f"sd3-{distributed.rank()}")[0].load()
    objective = DMD2(gan_weight=1e-3)
    whole = objective.make_critic(teacher, teacher.start())
    split = objective.make_critic(teacher, teacher.start())
    split.load_state_dict(whole.state_dict())
    mesh = MeshSpec(shard=2).build(torch.device("cpu"))
    assert shard(split.denoiser, mesh, read=split.bottleneck) == 2  # the other block, and the rest
    torch.manual_seed(0)
    x, cond = torch.randn(2, *teacher.shape), teacher.conditioner.cond(torch.tensor([0, 1]), 2)
    gradients = []
    for critic in (whole, split):
        leaf = x.clone().requires_grad_()
        critic.logits(leaf, torch.full((2,), 0.5), cond).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_bfloat16_and_pictures(place):
    """Split networks whose weights travel as bfloat16 train, draw and leave whole float32 weights."""
    ranks(narrow_runs, place)
    for name, drawn in (("pretraining", "samples"), ("dit", "panel")):
        run = place / "narrow" / name
        assert list((run / "pictures").glob(f"{drawn}-*.png"))
        weights = load_weights(next(run.glob("*.safetensors")))[0]
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights.values())


@pytest.mark.slow
def test_the_command_goes_on_in_another_arrangement(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["distill", "mixture/sid", "--out", str(tmp_path), "--teacher.fit-steps", "0", "--train.batch-size", "16"]
    assert main([*command, "--processes", "2", "--train.mesh.shard", "2", "--train.images", "160"]) == 0
    assert main([*command, "--processes", "1", "--train.images", "320"]) == 0
    assert Checkpoints(tmp_path / "checkpoints").latest().name == "000000000320"


@pytest.mark.slow
def test_stopped_and_resumed_equals_unbroken_bit_for_bit(place):
    assert_same_run(place / "2-2" / "stopped", place / "2-2" / "dmd2")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict:
    """What one unbroken process makes of DMD2 in micro-batches of two."""
    folder = tmp_path_factory.mktemp("unbroken")
    fit(dmd2(images=LONGER, micro_batch=2), folder)
    return state_of(folder)


@pytest.mark.slow
def test_a_run_goes_on_in_one_process(place, unbroken, tmp_path):
    """Saved by two processes that share the networks, resumed by one that holds them whole."""
    shutil.copytree(place / "half", tmp_path / "run")
    assert Checkpoints.images_of(Checkpoints(tmp_path / "run" / "checkpoints").latest()) == STOP
    fit(dmd2(images=LONGER, micro_batch=2), tmp_path / "run")
    assert_close(state_of(tmp_path / "run"), unbroken, 1e-6)


@pytest.mark.slow
def test_a_run_goes_on_in_two_pairs(place, unbroken):
    """Saved by two processes that share the networks, resumed by four, two of which share one copy."""
    assert_close(state_of(place / "4-2" / "rest"), unbroken, 1e-6)


def test_a_mesh_that_does_not_fit_is_said():
    with pytest.raises(
        SettingsError, match=re.escape("`train.mesh` of 1 x 2 (replicate x shard) must have 2 processes, got 1")
    ):
        MeshSpec(shard=2).build(torch.device("cpu"))
    with pytest.raises(SettingsError, match="must have 3 processes"):
        MeshSpec(replicate=3).build(torch.device("cpu"))
    assert MeshSpec().build(torch.device("cpu")) is None
