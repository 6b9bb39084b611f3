"""Invariants of a run: stopped, killed and resumed it equals an unbroken one bit for bit; two processes equal one."""

import os
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
import yaml

from fewstep.cli import main as cli
from fewstep.data import Digits
from fewstep.diffusion.noise import LogNormalNoise
from fewstep.formats.model import DenoiserSpec
from fewstep.methods import DMD2
from fewstep.networks import DiTSpec
from fewstep.system import distributed
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.tracking import read_stats
from fewstep.system.weights import load_weights
from fewstep.teachers import NativeTeacher
from fewstep.training.distill import Distillation, Setup
from fewstep.training.optim import OptimSpec
from fewstep.training.pretrain import Pretraining
from fewstep.training.spec import TrainSpec
from fewstep.training.start import read_start
from tests.support.places import ROOT
from tests.support.processes import ranks, start
from tests.support.runs import (
    BATCH,
    STOP,
    assert_equal,
    assert_same_run,
    at,
    dmd2,
    fit,
    optim,
    pretraining,
    sid,
    train_spec,
)


def tensors_in(state) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for value in values for tensor in tensors_in(value)]


CASES = {
    "sid": sid,
    "dmd2": dmd2,
    "dmd2-bf16": lambda: dmd2(precision="bf16", micro_batch=None),
    "pretraining": pretraining,
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of the unbroken run of a case, made once."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            fit(CASES[name](), folders[name])
        return folders[name]

    return folder_of


@pytest.mark.parametrize("name", CASES)
def test_a_run_trains_something(unbroken, name):
    """Or else all the equalities below would say nothing: weights move, and move differently with another seed."""
    start, end = CASES[name](), Checkpoints(unbroken(name) / "checkpoints").load()["task"]
    network = "denoiser" if name == "pretraining" else "generator"
    moved = [not torch.equal(start.state_dict()[network][key], tensor) for key, tensor in end[network].items()]
    assert sum(moved) > 0.8 * len(moved)
    assert not torch.equal(tensors_in(end["ema"])[-1], tensors_in(end[network])[-1])
    kinds = {line["kind"] for line in read_stats(unbroken(name) / "stats.jsonl")}
    assert kinds >= {"train", "evaluation"}


def test_without_an_average_nothing_is_kept_twice(tmp_path):
    """The student is the generator as it is, and the run goes on, also with its weights at the host."""
    for images, offload in ((64, False), (96, True), (128, False)):
        task = sid(ema_half_life=0, images=images, offload=offload)
        assert (task.generator.average is task.nets.generator) == (not offload)
        fit(task, tmp_path)
        state = Checkpoints(tmp_path / "checkpoints").load()["task"]
        assert "ema" not in state
        student = load_weights(tmp_path / "student.safetensors")[0]
        assert student and all(
            torch.equal(value, state["generator"][f"denoiser.{name}"]) for name, value in student.items()
        )
        assert torch.equal(*(tensors_in(part)[0] for part in (read_start(tmp_path)["generator"], state["generator"])))


@pytest.mark.parametrize("name", CASES)
def test_a_run_stopped_by_a_signal_and_resumed_equals_an_unbroken_one(unbroken, tmp_path, name):
    """Stopped within the 11th iteration, in the middle of the critic's turns and of a line of the log; and once more."""
    for images in (STOP - BATCH, 136):
        with pytest.raises(KeyboardInterrupt, match=f"{images + BATCH} images"):
            fit(at(images, CASES[name](), lambda: os.kill(os.getpid(), signal.SIGTERM)), tmp_path)
    assert Checkpoints.images_of(Checkpoints(tmp_path / "checkpoints").latest()) == 144
    torch.manual_seed(99)  # a new process's random state is another
    fit(CASES[name](), tmp_path)
    assert_same_run(tmp_path, unbroken(name))


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_crashed_and_resumed_equals_an_unbroken_one(unbroken, tmp_path, name):
    """It dies at 104 images; what it had logged and averaged since its checkpoint of 64 is done again."""

    def crash():
        raise MemoryError("crashed")

    with pytest.raises(MemoryError):
        fit(at(104, CASES[name](), crash), tmp_path)
    assert Checkpoints.images_of(Checkpoints(tmp_path / "checkpoints").latest()) == 64
    assert any(line["images"] > 64 for line in read_stats(tmp_path / "stats.jsonl"))
    fit(CASES[name](), tmp_path)
    assert_same_run(tmp_path, unbroken(name))


def test_another_seed_is_another_run(unbroken, tmp_path):
    """Or the comparisons above could not fail."""
    fit(sid(seed=1), tmp_path)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path, unbroken("sid"))


# ------------------------------------------------------------------------------------------------ with real pictures


@pytest.fixture(scope="module")
def digits_teacher(tmp_path_factory) -> NativeTeacher:
    """A tiny transformer pretrained on a few hundred digits."""
    folder = tmp_path_factory.mktemp("teacher")
    spec = DenoiserSpec(net=DiTSpec(size=8, channels=1, patch=2, width=32, depth=2, heads=2, num_classes=10))
    train = TrainSpec(images=640, batch_size=32, precision="fp32", device="cpu", evaluate_every=None, ema_half_life=50)
    fit(Pretraining(spec, Digits().load(), OptimSpec(lr=4e-3), train, LogNormalNoise(), 0.1, None, 5, {}), folder)
    return NativeTeacher(path=str(folder))


def on_digits(teacher: NativeTeacher) -> Distillation:
    loaded = teacher.load()
    train = train_spec(
        images=64, micro_batch=None, precision="bf16", log_every=16, evaluate_every=32, checkpoint_every=24
    )
    at = tuple(loaded.denoiser.schedule.time(torch.tensor([80.0, 2.0])).clamp(max=1).tolist())
    return Distillation(Setup(loaded, at, DMD2(critic_steps=3), train, optim(), optim(), Digits().load()))


def test_a_resumed_run_on_images_equals_an_unbroken_one(digits_teacher, tmp_path):
    """Classes, a transformer, bf16, GAN, two steps, pictures drawn on the way."""
    fit(on_digits(digits_teacher), tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        fit(at(32, on_digits(digits_teacher), lambda: os.kill(os.getpid(), signal.SIGTERM)), tmp_path / "stopped")
    fit(on_digits(digits_teacher), tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "unbroken")
    pictures = sorted(path.name for path in (tmp_path / "stopped" / "pictures").iterdir())
    assert pictures == ["panel-000000000000.png", "panel-000000000032.png", "panel-000000000064.png", "student-000000000000.png", "student-000000000032.png", "student-000000000064.png", "teacher.png",
    ]  # fmt: skip
    for name in pictures:
        assert (tmp_path / "stopped" / "pictures" / name).read_bytes() == (
            tmp_path / "unbroken" / "pictures" / name
        ).read_bytes()


def test_a_resumed_run_gives_the_warnings_of_an_unbroken_one(digits_teacher, tmp_path):
    """What the teacher's samples look like is not in the checkpoint: advice must not depend on having drawn them."""
    unbroken, resumed = on_digits(digits_teacher), on_digits(digits_teacher)
    unbroken.picture(0, tmp_path)
    resumed.load_state_dict(unbroken.state_dict())
    stats = {"x_spread": 1e-3}
    assert [code for code, _ in unbroken.advise(stats)] == ["collapse"]
    assert list(resumed.advise(stats)) == list(unbroken.advise(stats))


# ----------------------------------------------------------------------------------------------------------- kill -9

RUN = {
    "kind": "distill",
    "teacher": {"kind": "mixture", "fit_steps": 0, "width": 16},
    "objective": {"method": "sid"},
    "optim": {"generator": {"kind": "adam", "lr": 1e-3}, "critic": {"kind": "adam", "lr": 1e-3, "decay_from": 0.5}},
    "train": {
        "images": 2600, "batch_size": 8, "precision": "fp32", "device": "cpu", "threads": 1, "log_every": 100,
        "evaluate_every": 600, "checkpoint_every": 120,
    },
    "evaluation": {"samples": 0},
}  # fmt: skip


def wait_for(condition, process: ForkServerProcess, said: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), said.read_text()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def checkpoints_of(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").glob("0*")] if (folder / "checkpoints").exists() else []


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_an_unbroken_one(tmp_path):
    """Twice at any moment, once while a checkpoint is being written."""
    recipe, broken, whole = tmp_path / "run.yaml", tmp_path / "broken", tmp_path / "whole"
    recipe.write_text(yaml.safe_dump(RUN))
    said, command = tmp_path / "said", ["distill", str(recipe), "--out", str(broken), "--processes", "1"]
    chance = random.Random(time.time_ns())
    died_at = []
    for kill in range(3):
        before = max(checkpoints_of(broken), default="")
        process = start(said, cli.main, command)
        wait_for(lambda before=before: max(checkpoints_of(broken), default="") > before, process, said)
        if kill == 1:
            wait_for(lambda: any((broken / "checkpoints").glob(".tmp-*")), process, said)
        else:
            time.sleep(chance.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was still at work"
        died_at.append(max(checkpoints_of(broken), default="none yet"))
    process = start(said, cli.main, command)
    process.join(240)
    assert process.exitcode == 0 and "resuming at" in said.read_text(), said.read_text()
    assert cli.main(["distill", str(recipe), "--out", str(whole), "--processes", "1"]) == 0
    print("killed at", died_at)
    assert_same_run(broken, whole)


# ------------------------------------------------------------------------------------------------------ two processes


def two_process_runs(folder: Path) -> None:
    """In each process: unbroken runs, and one that a signal to one process stops, resumed."""
    with distributed.process_group():
        for name, case in {"sid": sid, "dmd2": dmd2}.items():
            fit(case(), folder / name)
        task = dmd2()
        if distributed.rank() == 1:
            at(STOP - BATCH, task, lambda: os.kill(os.getpid(), signal.SIGTERM))
        try:
            fit(task, folder / "stopped")
        except KeyboardInterrupt as stopped:
            assert f"{STOP} images" in str(stopped)
        else:
            raise AssertionError("a signal to one process stops both")
        fit(dmd2(), folder / "stopped")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    ranks(two_process_runs, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sid", "dmd2"])
def test_two_processes_equal_one_with_two_micro_batches(unbroken, two, name):
    """Micro-batches of 4 in a batch of 8, in one process (the case) or one each in two."""
    one, both = (Checkpoints(folder / "checkpoints").load()["task"] for folder in (unbroken(name), two / name))
    for part in ("generator", "critic", "ema"):
        for key, tensor in one[part].items():
            torch.testing.assert_close(
                both[part][key], tensor, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
            )
    shared = ("loss/", "gradient_norm/", "logit_")  # the others are of the first micro-batch of a process
    lines = [
        [line for line in read_stats(folder / "stats.jsonl") if line["kind"] == "train"]
        for folder in (unbroken(name), two / name)
    ]
    assert [line["images"] for line in lines[0]] == [line["images"] for line in lines[1]] and len(lines[0]) == 4
    for a, b in zip(*lines, strict=True):
        names = [key for key in a if key.startswith(shared)]
        assert len(names) >= 4
        assert {key: b[key] for key in names} == pytest.approx({key: a[key] for key in names}, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_equal_two_unbroken(two):
    """Also where the signal reaches only one of them."""
    states = [Checkpoints(two / name / "checkpoints").load() for name in ("stopped", "dmd2")]
    assert_equal(*states)


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_log_what_two_unbroken_log(two):
    assert (two / "stopped" / "stats.jsonl").read_bytes() == (two / "dmd2" / "stats.jsonl").read_bytes()


@pytest.mark.slow
def test_two_processes_from_one_command(tmp_path, monkeypatch, capfd):
    """`--processes 2` equals `--processes 1 --train.micro-batch 8`, and a folder in use is refused in one line by both."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    common = [
        "distill",
        "recipes/mixture/sid.yaml",
        "--train.images",
        "640",
        "--train.batch-size",
        "16",
        "--teacher.fit-steps",
        "0",
    ]
    common += ["--train.log-every", "160"]
    assert cli.main([*common, "--out", str(tmp_path / "two"), "--processes", "2"]) == 0
    assert "Traceback" not in capfd.readouterr().err
    assert cli.main([*common, "--out", str(tmp_path / "one"), "--processes", "1", "--train.micro-batch", "8"]) == 0
    two, one = (load_weights(tmp_path / name / "student.safetensors")[0] for name in ("two", "one"))
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_an_error_in_two_processes_is_one_line_and_a_code(tmp_path, monkeypatch, capfd):
    from fewstep.system.files import RunLock

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with RunLock(tmp_path):
        assert (
            cli.main(["distill", "mixture/sid", "--out", str(tmp_path), "--processes", "2", "--teacher.fit-steps", "0"])
            == 1
        )
    text = capfd.readouterr().err
    assert "Traceback" not in text and "in use by process" in text
    assert len([line for line in text.splitlines() if line.startswith("fewstep distill:")]) == 1
