"""Health of a distillation: a fixed set of samples compared with the teacher's, warnings, and the end of a collapsed run.

At each evaluation the student draws the same seeds and conditions. Loss values do not show how a distillation does; these
numbers do, without a data set and without a feature network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from fewstep.diffusion.denoiser import Cond, Denoiser
from fewstep.diffusion.generator import Generator, Rollout
from fewstep.diffusion.guidance import Guided
from fewstep.diffusion.noise import double_device
from fewstep.evaluation.probe import Look, compared, explained, look, outside, probe_set
from fewstep.methods.base import Nets, Objective
from fewstep.students.sample import FewStep, ManyStep, Sampler, generate, noise_of
from fewstep.system.errors import UserError
from fewstep.system.record import Record
from fewstep.teachers.base import NoPrompts, Teacher
from fewstep.teachers.prompts import Prompts
from fewstep.training.spec import TrainSpec
from fewstep.training.task import Micro

__all__ = ["Collapsed", "Health", "HealthSpec"]

LEVELS = (0.3, 1.0, 3.0)  # noise-to-signal ratios at which the teacher is checked
TOLD = (1.0, 0.5, 2.0)  # ratio that it is told, in the one there is
MISMATCH = 0.02  # distance of 64 samples from 64; healthy runs on the digits had at most 0.006
COLLAPSED = 0.3  # diversity of a collapsed student, in the teacher's


class HealthSpec(Record):
    """The probe: samples of the student at each evaluation, compared with the teacher's from the same seeds."""

    samples: int | None = Field(None, ge=0)
    """Number of samples, of up to 8 classes or captions with at least 4 each; 0 turns the probe off. null: 64, but 0 for
    text-to-image, where 64 samples of the teacher can take half an hour."""
    evaluations: int = Field(35, gt=0)
    """Network calls per sample of the teacher, which draws once at the start and once after each resumption."""
    stop_at_collapse: bool = False
    """End the run when its diversity was below 0.3 of the teacher's in two evaluations in turn, and below 0.8 of its own best."""


class Collapsed(UserError):
    """The run was to stop at collapse, and its last evaluation shows one."""


class Roll(Protocol):
    """Interface of a task's rollout: samples as training draws them, with their condition."""

    def __call__(self, micro: Micro, phase: str, steps: int, gradient: bool) -> tuple[Rollout, Cond]: ...


class Health:
    """The probe of one run and its history.

    Args:
        spec: settings; None for no probe.
        teacher: the diffusion model.
        nets: the networks of the distillation.
        objective: the method.
        train: settings of the run.
        narrow: the networks' weights are split or rounded, so that they compute in bfloat16 alone.
    """

    def __init__(
        self,
        spec: HealthSpec | None,
        teacher: Teacher,
        nets: Nets,
        objective: Objective,
        train: TrainSpec,
        narrow: bool,
    ) -> None:
        self.spec = spec = spec or HealthSpec(samples=0)
        self.teacher, self.generator, self.denoiser = teacher, nets.generator, nets.teacher
        self.train, self.device, self.bf16 = train, train.torch_device(), train.bf16() and narrow
        self.rolls = nets.generator.steps > 1 and objective.starts_from == "noise"
        self.history: list[dict[str, float]] = []
        self._own = torch.empty(0)  # the teacher's samples, not decoded
        self._reference: Look | None = None
        classes = teacher.conditioner.num_classes
        text = isinstance(teacher.conditioner, Prompts | NoPrompts)
        wanted = (0 if text else 64) if spec.samples is None else spec.samples
        self.conditions, self.count, self.labels = probe_set(classes, wanted)

    def measure(
        self,
        images: int,
        student: Generator,
        roll: Roll,
        real: Callable[[Micro], tuple[Tensor, Cond]] | None,
        watch: Callable[[str], None],
    ) -> dict[str, Any]:
        """Draw the student, compare it with the teacher, and remember the numbers; returns them for the log.

        Args:
            images: images seen so far.
            student: the generator with averaged weights.
            roll: the task's rollout.
            real: micro-batch -> real images with their conditions; None: the teacher is checked on its own samples.
            watch: called with a progress text; may raise to abandon.
        """
        if self.count < 2 * self.conditions:
            return {}
        reference = self.reference(watch)
        samples = self._draw(FewStep(student, self.teacher.codec), "the student", watch)
        found = compared(look(samples, self.conditions, self.teacher.images), reference)
        aside = Micro(images, self.count, self.train.seed)  # the same on all processes
        if self.rolls and not self.teacher.sizes:
            found["probe_mismatch"] = self._mismatch(aside, roll)
        if not self.history:
            found |= self._check_teacher(aside, None if self.teacher.sizes else real)
        self.history = [line for line in self.history if line["images"] < images] + [{"images": images, **found}]
        return {**found, "probe": f"pixels/{self.conditions}x{self.count // self.conditions}/{self.spec.evaluations}"}

    def reference(self, watch: Callable[[str], None] = lambda doing: None) -> Look:
        """Look of the teacher's samples, drawn once."""
        if self._reference is None:
            calls = self.spec.evaluations
            sampler = ManyStep(self.denoiser, calls, self.device)
            self._own = torch.cat(list(self._draw(sampler, f"the teacher in {calls} calls", watch)))
            codec = self.teacher.codec
            decoded = (codec.decode(part.to(self.device)).cpu() if codec else part for part in self._own.split(8))
            with torch.no_grad():
                self._reference = look(decoded, self.conditions, self.teacher.images)
        return self._reference

    def _draw(self, sampler: Sampler, whose: str, watch: Callable[[str], None]) -> Iterator[Tensor]:
        return generate(
            sampler, range(self.count), self.teacher.shape, self.teacher.conditioner, labels=self.labels, batch=32,
            device=self.device, uint8=False, bf16=self.bf16,
            progress=lambda done: watch(f"probe: {whose}, {done} of {self.count} samples"),
        )  # fmt: skip

    @torch.no_grad()
    def _mismatch(self, aside: Micro, roll: Roll) -> float:
        """Distance of samples of training at the last step from those of inference, under the same conditions."""
        made, cond = roll(aside, "probe", self.generator.steps, False)
        self.generator.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.train.bf16()):
            x = self.generator([torch.randn_like(made.x) for _ in range(self.generator.steps)], **cond)
        trained, inferred = (look([x.float().cpu()], 1, False) for x in (made.x, x))
        return compared(trained, inferred).get("probe_distance", 0.0)

    @torch.no_grad()
    def _check_teacher(self, aside: Micro, real: Callable[[Micro], tuple[Tensor, Cond]] | None) -> dict[str, float]:
        """Variance that the unguided teacher explains at `LEVELS`, told the noise there is, and half and twice of it.

        E[x | x_t] has the least squared error of all functions of x_t, so a teacher told another level does not predict better.
        """
        guided = isinstance(self.denoiser, Guided)
        denoiser = self.denoiser.denoiser if isinstance(self.denoiser, Guided) else self.denoiser
        if real is not None:
            x, cond = real(aside)
        elif guided:
            return {}  # its own samples are not those of the unguided teacher
        else:
            x = self._own.to(self.device)
            made = self.teacher.conditioner.cond(self.labels, len(x))
            cond = {name: value.to(self.device) for name, value in made.items()}
        found = {}
        for ratio in LEVELS:
            x_t, scale = self._noised(denoiser, x, ratio)
            for told in TOLD:
                t, norm = self._at(denoiser, len(x), told * ratio)
                denoised = self._denoised(denoiser, norm / scale * x_t, t, cond)
                name = f"{ratio:g}" if told == 1 else f"{ratio:g}x{told:g}"
                found[f"teacher_explains/{name}"] = explained(x, denoised)
        return found

    def _at(self, denoiser: Denoiser, count: int, ratio: float) -> tuple[Tensor, float]:
        """Time [count] of a noise-to-signal ratio, and the norm of (alpha, sigma) there."""
        t = denoiser.schedule.time(torch.full((count,), ratio, dtype=torch.float64)).clamp(0, 1)
        alpha, sigma = (value[0].item() for value in denoiser.schedule.alpha_sigma(t))
        return t.to(double_device(self.device)), math.hypot(alpha, sigma)

    def _noised(self, denoiser: Denoiser, x: Tensor, ratio: float) -> tuple[Tensor, float]:
        t, norm = self._at(denoiser, len(x), ratio)
        noise = noise_of(range(len(x)), tuple(x.shape[1:]), step=2000).to(self.device)
        return denoiser.schedule.perturb(x, t, noise), norm

    def _denoised(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            parts = [slice(i, i + 8) for i in range(0, len(x_t), 8)]
            return torch.cat([denoiser(x_t[i], t[i], **{k: value[i] for k, value in cond.items()}) for i in parts])

    # -- what the numbers say --------------------------------------------------------------------------------------

    def diagnose(self, last: bool) -> Iterator[tuple[str, str]]:
        """Yield warnings (code, text with advice) about the newest evaluation.

        A number that moves towards the teacher's is no warning before the run's last evaluation.

        Args:
            last: True at the end of the run.
        """
        if not self.history:
            return
        now, before = self.history[-1], self.history[-2] if len(self.history) > 1 else {}
        yield from _of_teacher(now)
        if now["images"] == 0:
            return
        for name, code, text in outside(now):
            if last or not _recovers(now[name], before.get(name)):
                yield code, text
        if now.get("probe_mismatch", 0.0) > MISMATCH * max(1.0, 64 / self.count):
            yield (
                "training-mismatch",
                f"samples of training are {now['probe_mismatch']:.3f} from those that the same student draws in "
                f"{self.teacher.name}'s few steps (their own diversity is 1): the student is trained on inputs that it never meets. "
                "Try: backward simulation, which `Generator.rollout` does",
            )
        distances = {line["images"]: line["probe_distance"] for line in self.history if "probe_distance" in line}
        if distances and distances[now["images"]] > 1.2 * (best := min(distances.values())) + 0.05:
            at = min(distances, key=lambda images: distances[images])
            yield (
                "away-from-teacher",
                f"the distance to the teacher's samples is {distances[now['images']]:.2f}, and was {best:.2f} at {at:,.0f} images. "
                "Try: the student in best/ (if no other score decides), or lower optim.generator.lr",
            )

    def advise(self, stats: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """Yield warnings about the training log that only the probe can tell from success."""
        distance = self.history[-1].get("probe_distance", 0.0) if self.history else 0.0
        if distance < 0.1:
            return
        gap, scores = stats.get("gap_real"), stats.get("gap_scores")
        if gap and scores is not None and scores < 0.02 * gap:
            yield (
                "critic-idle",
                f"the fake score predicts what the teacher does ({scores:.2g} apart) though the samples differ ({distance:.2f}): the "
                "generator gets no gradient. Try: raise optim.critic.lr or objective.critic-steps",
            )

    def settle(self) -> None:
        """Raise `Collapsed` if the run has collapsed and is to stop then."""
        values = [line["probe_diversity"] for line in self.history if "probe_diversity" in line]
        if not self.spec.stop_at_collapse or len(values) < 3:
            return
        if max(values[-2:]) < COLLAPSED and values[-1] < 0.8 * max(values):
            raise Collapsed(
                f"stopped at {self.history[-1]['images']:,} images: the diversity of one condition's samples is {values[-1]:.2f} times "
                f"the teacher's, after {values[-2]:.2f}, and was {max(values):.2f} (health.stop_at_collapse). The best student is in "
                "best/ of the run folder. Try: a lower optim.generator.lr, and --start-from best/student.safetensors with another --out"
            )


def _recovers(value: float, earlier: float | None) -> bool:
    """Return whether a ratio has come a tenth nearer to 1 on a logarithmic scale."""
    away, before = (abs(math.log(max(v, 1e-6))) if v is not None else None for v in (value, earlier))
    return before is not None and away is not None and away < 0.9 * before


def _of_teacher(line: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Warnings about a teacher that is not a denoiser of the samples it is checked on."""
    fits = {level: line[f"teacher_explains/{level:g}"] for level in LEVELS if f"teacher_explains/{level:g}" in line}
    if not fits:
        return
    if (worst := min(fits.values())) < 0:
        yield (
            "teacher-prediction",
            f"the teacher predicts clean samples worse than their mean does (it explains {worst:.0%} of their variance): its prediction "
            "type or scaling is wrong. Try: the prediction (eps, v, x0, flow, edm) that it was trained with",
        )
        return
    for told in TOLD:
        gains = [line[f"teacher_explains/{level:g}x{told:g}"] - fits[level] for level in LEVELS] if told != 1 else [0.0]
        if sum(gains) / len(gains) > 0.01:
            yield (
                "teacher-shift",
                f"told {told:g} times the noise that there is, the teacher predicts clean samples better (it explains "
                f"{100 * sum(gains) / len(gains):.1f} % more of their variance). Try: the noise schedule and shift that it was trained "
                "with",
            )
            return
