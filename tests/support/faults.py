"""Known faults of distillations, built on purpose: each changes one thing of a healthy run on the digits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.generator import Rollout
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.run.overriding import override
from fewstep.run.settings import load_run
from fewstep.system.tracking import read_stats
from fewstep.teachers.base import Teacher
from fewstep.training.trainer import Trainer

SETTINGS = [
    "--train.images", "960", "--train.log-every", "960", "--train.evaluate-every", "960", "--train.checkpoint-every", "960",
    "--train.precision", "fp32", "--train.device", "cpu", "--evaluation.samples", "0",
]  # fmt: skip
ONE_STEP = ["--optim.generator.lr", "5e-4", "--optim.critic.lr", "1e-3"]


@dataclass(frozen=True)
class Fault:
    """A way to spoil a run.

    Attributes:
        title: what is wrong.
        code: the warning that names it; empty for a healthy run.
        recipe: the run.
        settings: its settings.
        teacher: changes the teacher.
        task: changes the task in place.
    """

    title: str
    code: str
    recipe: str = "digits/dmd2"
    settings: tuple[str, ...] = ()
    teacher: Callable[[Teacher], Teacher] = lambda teacher: teacher
    task: Callable[[Any], None] = lambda task: None


class Shifted(Denoiser):
    """A denoiser that is told another noise level than there is."""

    def __init__(self, inner: Denoiser, factor: float) -> None:
        super().__init__()
        self.inner, self.schedule, self.factor = inner, inner.schedule, factor
        self.net = getattr(inner, "net", None)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        sigma = self.schedule.alpha_sigma(t)[1].double() * self.factor
        return self.inner(x_t, self.schedule.time(sigma).clamp(0, 1).to(t), **cond)


def of(teacher: Teacher, wrap: Callable[[Denoiser], Denoiser]) -> Teacher:
    return replace(
        teacher, denoiser=wrap(teacher.denoiser), start=lambda: wrap(teacher.start()), student_spec=teacher.student_spec
    )


def another_prediction(denoiser: Denoiser) -> Denoiser:
    assert isinstance(denoiser, Preconditioned)
    return Preconditioned(denoiser.net, denoiser.schedule, "x0")


def teacher_forced(task: Any) -> None:
    """Later steps start from noised real images instead of the student's own samples, as before DMD2."""
    rollout = task._rollout

    def forced(micro: Any, phase: str, steps: int, gradient: bool) -> Any:
        if steps == 1:
            return rollout(micro, phase, steps, gradient)
        micro.reseed(phase)
        generator = task.nets.generator
        real, cond = task._images(micro)
        t = torch.full((len(real),), generator.times[steps - 1], dtype=torch.float64)
        x_t = generator.denoiser.schedule.perturb(real, t, torch.randn_like(real))
        with torch.set_grad_enabled(gradient):
            return Rollout(generator.denoiser(x_t, t, **cond), steps - 1, x_t, t), cond

    task._rollout = forced


def deaf(task: Any) -> None:
    """The discriminator's head reads nothing."""
    for parameter in task.critic.module.head.parameters():
        torch.nn.init.zeros_(parameter)
        parameter.register_hook(torch.zeros_like)


TWO_STEPS = ("--generator.sigmas", "20", "0.3", "--optim.generator.lr", "5e-4")
FAULTS = {
    "healthy": Fault("healthy", "", settings=tuple(ONE_STEP)),
    "healthy-two-steps": Fault("healthy, two steps", "", settings=TWO_STEPS),
    "no-backward-simulation": Fault(
        "no backward simulation", "training-mismatch", settings=TWO_STEPS, task=teacher_forced
    ),
    "dead-gan": Fault("dead discriminator", "gan-idle", settings=tuple(ONE_STEP), task=deaf),
    "lagging-critic": Fault(
        "lagging critic", "critic-idle", settings=("--optim.critic.lr", "1e-6", "--optim.generator.lr", "2e-3")
    ),
    "wrong-shift": Fault(
        "wrong shift",
        "teacher-shift",
        settings=tuple(ONE_STEP),
        teacher=lambda teacher: of(teacher, lambda d: Shifted(d, 3.0)),
    ),
    "wrong-prediction": Fault(
        "wrong prediction type",
        "teacher-prediction",
        settings=tuple(ONE_STEP),
        teacher=lambda teacher: of(teacher, another_prediction),
    ),
    "wrong-shift-free": Fault(
        "wrong shift", "teacher-shift", "digits/sid", teacher=lambda teacher: of(teacher, lambda d: Shifted(d, 3.0))
    ),
    "wrong-prediction-free": Fault(
        "wrong prediction type",
        "teacher-prediction",
        "digits/sid",
        teacher=lambda teacher: of(teacher, another_prediction),
    ),
}


def train(name: str, folder: Path, more: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Train a fault's run; returns the lines of its log."""
    fault = FAULTS[name]
    run = override(load_run(fault.recipe), [*SETTINGS, *fault.settings, *more])
    trainer: Trainer = run.trainer(folder, fault.teacher(run.teacher.load()))
    fault.task(trainer.task)
    trainer.fit()
    return read_stats(folder / "stats.jsonl")
