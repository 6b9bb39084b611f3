"""Small training runs on the mixture, and what it means that two runs are equal."""

import os
from pathlib import Path

import torch

from fewstep.data import Digits
from fewstep.diffusion.noise import Karras, LogNormalNoise
from fewstep.formats.model import DenoiserSpec
from fewstep.methods import DMD2, SiD
from fewstep.networks import DiTSpec
from fewstep.system.checkpoint import Checkpoints
from fewstep.teachers import MixtureTeacher
from fewstep.training.distill import Distillation, Setup
from fewstep.training.optim import OptimSpec
from fewstep.training.pretrain import Pretraining
from fewstep.training.spec import TrainSpec
from fewstep.training.task import Task
from fewstep.training.trainer import Trainer
from tests.support.places import ROOT

SCHEDULE = Karras(sigma_max=20.0)


IMAGES = 200


BATCH = 8


STOP = 88  # 11 iterations: no multiple of log_every, of checkpoint_every, of critic_steps x batch


class Points:
    """Samples of the mixture in place of a dataset."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.x = MixtureTeacher(schedule=SCHEDULE).denoiser().sample(50)

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices, flip=None):
        return self.x[indices], None


def train_spec(**changes) -> TrainSpec:
    settings = dict(
        images=IMAGES, batch_size=BATCH, micro_batch=4, precision="fp32", device="cpu", log_every=50, evaluate_every=60,
        checkpoint_every=56, ema_half_life=40, ema_ramp=0.5,
    )  # fmt: skip
    return TrainSpec(**settings | changes)


def optim(**changes) -> OptimSpec:
    return OptimSpec(
        **dict(lr=3e-3, betas=(0.5, 0.99), weight_decay=0.01, warmup=40, decay_from=0.5, clip=1.0) | changes
    )


def times(*sigmas: float) -> tuple[float, ...]:
    return tuple(SCHEDULE.time(torch.tensor(sigmas, dtype=torch.float64)).clamp(max=1).tolist())


def sid(**train) -> Distillation:
    teacher = MixtureTeacher(schedule=SCHEDULE, width=16, fit_steps=0).load()
    return Distillation(
        Setup(teacher, times(2.5), SiD(), train_spec(**train), optim(kind="adam", weight_decay=0), optim())
    )


def dmd2(**train) -> Distillation:
    """GAN, two steps, three critic updates a generator update."""
    teacher = MixtureTeacher(schedule=SCHEDULE, width=16, fit_steps=0).load()
    return Distillation(
        Setup(teacher, times(20.0, 1.0), DMD2(critic_steps=3), train_spec(**train), optim(), optim(), Points())
    )


def pretraining(**train) -> Pretraining:
    net = DiTSpec(size=8, channels=1, patch=4, width=16, depth=1, heads=2, num_classes=10)
    spec = DenoiserSpec(net=net)
    return Pretraining(spec, Digits().load(), optim(), train_spec(**train), LogNormalNoise(), 0.1, None, 5, {})


def fit(task: Task, folder: Path) -> None:
    Trainer(task, task.train, folder).fit()


def at(images: int, task: Task, action) -> Task:
    """`task`, with `action` called within the update that begins at `images`."""
    update = task.update

    def wrapped(seen, micros):
        if seen == images:
            action()
        return update(seen, micros)

    task.update = wrapped
    return task


def assert_equal(actual, expected, where: str = "state") -> None:
    """The same keys in the same order, the same types, the same bits."""
    assert type(actual) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key in expected:
            assert_equal(actual[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            assert_equal(*pair, f"{where}/{i}")
    else:
        assert actual == expected, where


def assert_same_run(actual: Path, expected: Path) -> None:
    """Weights, averages, optimizers, what is still to be logged, the log, and the file for people."""
    assert_equal(Checkpoints(actual / "checkpoints").load(), Checkpoints(expected / "checkpoints").load())
    assert (actual / "stats.jsonl").read_bytes() == (expected / "stats.jsonl").read_bytes()
    for file in expected.glob("*.safetensors"):
        assert (actual / file.name).read_bytes() == file.read_bytes()


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
