"""The analytic teacher: a Gaussian mixture with exact x0, score and samples. A full teacher family, for tests and study.

For p(x) = sum_k w_k N(mu_k, s_k² I) and x_t = alpha x + sigma eps (Bishop 2006, eq. 2.116 and 9.23):

    p(x_t | k) = N(alpha mu_k, v_k I)    with v_k = alpha² s_k² + sigma²
    E[x | x_t, k] = mu_k + (alpha s_k² / v_k) (x_t - alpha mu_k)
    E[x | x_t] = sum_k p(k | x_t) E[x | x_t, k]
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.noise import Karras, LogNormalNoise, Schedule, ScheduleSpec, unsqueeze_as
from fewstep.diffusion.preconditioned import Preconditioned, Prediction
from fewstep.formats.model import DenoiserSpec
from fewstep.networks import MLPSpec
from fewstep.teachers.base import ClassLabels, Teacher, TeacherSpec

__all__ = ["MixtureDenoiser", "MixtureTeacher", "ring"]


def ring(
    components: int = 8, radius: float = 1.0, std: float = 0.1
) -> tuple[tuple[tuple[float, float], ...], tuple[float, ...]]:
    """Means and standard deviations of the classic ring of Gaussians in the plane."""
    angles = [2 * math.pi * k / components for k in range(components)]
    return tuple((radius * math.cos(a), radius * math.sin(a)) for a in angles), (std,) * components


class MixtureDenoiser(Denoiser):
    """Exact E[x | x_t] of a mixture of isotropic Gaussians.

    Args:
        means: [K, D].
        stds: [K].
        weights: [K], summing to one.
        schedule: noise schedule.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)
        self.register_buffer("weights", weights)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        alpha_t, sigma_t = (c[:, None].to(x_t) for c in self.schedule.alpha_sigma(t))
        variance = alpha_t**2 * self.stds**2 + sigma_t**2  # [B, K]
        offset = x_t[:, None] - alpha_t[..., None] * self.means  # [B, K, D]
        share = torch.softmax(self._log_weights(offset, variance), dim=1)
        posterior = self.means + (alpha_t * self.stds**2 / variance)[..., None] * offset
        return (share[..., None] * posterior).sum(1)

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Log density [B] of the noised marginal at `x_t` [B, D]."""
        alpha_t, sigma_t = (c[:, None].to(x_t) for c in self.schedule.alpha_sigma(t))
        variance = alpha_t**2 * self.stds**2 + sigma_t**2
        offset = x_t[:, None] - alpha_t[..., None] * self.means
        return self._log_weights(offset, variance).logsumexp(1) - x_t.shape[1] / 2 * math.log(2 * math.pi)

    def _log_weights(self, offset: Tensor, variance: Tensor) -> Tensor:
        dimensions = offset.shape[-1]
        return self.weights.log() - dimensions / 2 * variance.log() - (offset**2).sum(-1) / (2 * variance)

    def sample(self, count: int) -> Tensor:
        """Exact samples [count, D], from torch's global generator."""
        component = torch.multinomial(self.weights, count, replacement=True)
        return self.means[component] + self.stds[component, None] * torch.randn(count, self.means.shape[1])


class MixtureTeacher(TeacherSpec):
    """A Gaussian mixture in D dimensions; its student is a small MLP fitted to the exact denoiser on loading."""

    students_stand_alone: ClassVar[bool] = True

    kind: Literal["mixture"] = "mixture"
    means: tuple[tuple[float, ...], ...] = ring()[0]
    """Component means; the default is a ring of eight in the plane."""
    stds: tuple[PositiveFloat, ...] = ring()[1]
    """Standard deviation of each component."""
    weights: tuple[PositiveFloat, ...] | None = None
    """Share of each component; null for equal."""
    schedule: ScheduleSpec = Karras(sigma_max=20.0)
    """Noise schedule."""
    prediction: Prediction | None = None
    """Prediction type of the student MLP; null: edm under Karras noise, v under a table, flow under a flow."""
    width: int = Field(64, gt=0)
    """Width of the student MLP."""
    fit_steps: int = Field(400, ge=0)
    """Updates that fit the student to the exact denoiser before distillation."""

    @model_validator(mode="after")
    def _consistent(self) -> MixtureTeacher:
        if len({len(mean) for mean in self.means}) != 1:
            raise ValueError(f"`means` must have one dimension, got {sorted({len(mean) for mean in self.means})}")
        if len(self.stds) != len(self.means):
            raise ValueError(f"`stds` must be one for each of {len(self.means)} means, got {len(self.stds)}")
        if self.weights is not None and len(self.weights) != len(self.means):
            raise ValueError(f"`weights` must be one for each of {len(self.means)} means, got {list(self.weights)}")
        return self

    def denoiser(self) -> MixtureDenoiser:
        """The exact denoiser."""
        means = torch.tensor(self.means)
        weights = torch.ones(len(means)) if self.weights is None else torch.tensor(self.weights)
        return MixtureDenoiser(means, torch.tensor(self.stds), weights / weights.sum(), self.schedule)

    @cached_property
    def _student(self) -> Preconditioned:
        """Fit the MLP to the exact denoiser on noised samples (deterministic, without changing torch's random state)."""
        exact = self.denoiser()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            student = self._spec().build()
            optimizer = torch.optim.Adam(student.parameters(), lr=2e-3, betas=(0.9, 0.99))
            noise = LogNormalNoise(mean=-0.5, std=1.5)
            for step in range(self.fit_steps):
                optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / self.fit_steps)
                x = exact.sample(512)
                t = noise.draw(512, self.schedule)
                x_t = self.schedule.perturb(x, t, torch.randn_like(x))
                loss = (unsqueeze_as(student.loss_weight(t), x) * (student(x_t, t) - exact(x_t, t)) ** 2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return student

    def _spec(self) -> DenoiserSpec:
        usual: dict[str, Prediction] = {"karras": "edm", "discrete": "v", "flow": "flow"}
        return DenoiserSpec(
            net=MLPSpec(
                shape=(len(self.means[0]),),
                width=self.width,
                label_scale=1.0 if isinstance(self.schedule, Karras) else 1 / 500,
            ),
            schedule=self.schedule,
            prediction=self.prediction or usual[self.schedule.kind],
        )

    def load(self) -> Teacher:
        """Make the teacher; the first call of `start` fits the student (about a second)."""

        def start() -> Preconditioned:
            import copy

            return copy.deepcopy(self._student).requires_grad_(True)

        spec = self._spec()
        return Teacher(
            name=f"mixture-{len(self.means)}",
            denoiser=self.denoiser(),
            shape=(len(self.means[0]),),
            conditioner=ClassLabels(0),
            student_spec=spec,
            start=start,
            bottleneck=spec.net.bottleneck,
            images=False,
        )
