"""Noise schedules: the coefficients of `x_t = alpha_t x + sigma_t eps`. Knows nothing about networks.

Time is normalised: t = 0 is the clean end, t = 1 the noisiest step of the teacher's own grid. Index i of N is
t = i / (N - 1) for DDPM timesteps and Karras steps alike, so a paper's "t uniform in 2..98 % of the grid" is the same for
every teacher. Time is not a noise level because flow and zero-SNR models reach alpha = 0, where sigma / alpha is infinite.
Times slightly outside [0, 1] are valid if the formula extends there: log-normal training noise reaches below the sampler's
sigma_min.

Coefficients are computed in float64 and returned in float32: at the noisy end of an eps-model an error in alpha is
multiplied by fifteen.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

__all__ = [
    "Discrete", "Karras", "LogNormalNoise", "NoiseLaw", "RectifiedFlow", "Schedule", "ScheduleSpec", "UniformTime",
    "ddim_step", "double_device", "scaled_linear_alphas_cumprod", "unsqueeze_as",
]  # fmt: skip


_WITHOUT_DOUBLE = ("mps",)  # kinds of devices that know no float64


def double_device(device: torch.device) -> torch.device:
    """The device for times, which are float64, of samples on `device`: the CPU where that has no such numbers (MPS)."""
    return torch.device("cpu") if device.type in _WITHOUT_DOUBLE else device


def unsqueeze_as(coefficient: Tensor, x: Tensor) -> Tensor:
    """Append dimensions to `coefficient` [B] until it broadcasts over the samples `x` [B, ...], on their device."""
    return coefficient.to(x.device).reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Schedule(_Record, ABC):
    """Signal and noise over normalised time. Immutable; stored in model files."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal scale `alpha_t` and noise standard deviation `sigma_t` at times `t`; each [B], float32."""

    @abstractmethod
    def time(self, noise_to_signal: Tensor) -> Tensor:
        """Times [B] at which sigma_t / alpha_t equals `noise_to_signal` [B]: the inverse of `alpha_sigma`."""

    @abstractmethod
    def label(self, t: Tensor) -> Tensor:
        """Time input [B] (float32) of a network trained with this schedule."""

    def init_scale(self, t: float) -> float:
        """Standard deviation of a sampler's pure-noise input at time `t`.

        It is 1 for a variance-preserving network, also at SDXL's one-step t = 399, where sigma_t is only 0.76 (DMD2,
        appendix). It is sigma_t for a variance-exploding network: its samplers neglect the variance of the data.
        """
        return 1.0

    def perturb(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Noisy samples `alpha_t x + sigma_t eps`. Only this function adds noise to data.

        Args:
            x: clean samples [B, ...].
            t: times [B].
            eps: unit Gaussian noise, shape of `x`.
        """
        alpha_t, sigma_t = self.alpha_sigma(t)
        return unsqueeze_as(alpha_t, x) * x + unsqueeze_as(sigma_t, x) * eps

    def times(self, steps: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Equally spaced normalised times [steps] from `high`, the noisiest, down to `low` (float64)."""
        if steps == 1:
            return torch.tensor([high], dtype=torch.float64)
        return torch.linspace(high, low, steps, dtype=torch.float64)


class Karras(Schedule):
    """EDM's schedule (Karras et al. 2022, arXiv 2206.00364, eq. 5):

        alpha_t = 1,   sigma_t = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho

    with t = i / (N - 1) and i counted from the smallest sigma, as in DMD2's 1000-step grid. SiD's u, uniform in
    [0, t_max / 1000], equals this t.
    """

    kind: Literal["karras"] = "karras"
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    rho: float = Field(7.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Karras:
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"`sigma_max` must be above sigma_min {self.sigma_min}, got {self.sigma_max}")
        return self

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma_t = (low + t.double() * (high - low)).clamp(min=0) ** self.rho
        return torch.ones_like(sigma_t, dtype=torch.float32), sigma_t.float()

    def time(self, noise_to_signal: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (noise_to_signal.double() ** (1 / self.rho) - low) / (high - low)

    def label(self, t: Tensor) -> Tensor:
        """c_noise = ln(sigma) / 4 (Karras et al. 2022, table 1)."""
        return self.alpha_sigma(t)[1].log() / 4

    def init_scale(self, t: float) -> float:
        return self.alpha_sigma(torch.tensor([t], dtype=torch.float64))[1].item()


class Discrete(Schedule):
    """A DDPM table of alphas_cumprod (Ho et al. 2020, arXiv 2006.11239, eq. 4):

        alpha_t = √ᾱ_i,   sigma_t = √(1 - ᾱ_i)    at t = i / (N - 1)

    Between two steps the angle atan2(sigma, alpha) is interpolated, which stays finite and exact at the end of a zero-SNR
    table (alpha = 0). The network knows only the table's levels: `alpha_sigma` and `time` clamp to the table's ends. A user's
    levels are checked before (`fewstep.diffusion.generator.calls_at`).
    """

    kind: Literal["discrete"] = "discrete"
    alphas_cumprod: tuple[float, ...] = Field(min_length=2)

    @field_validator("alphas_cumprod")
    @classmethod
    def _falling(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= b < a <= 1 for a, b in itertools.pairwise(value)):
            raise ValueError("alphas_cumprod must fall strictly within [0, 1]")
        return value

    def _angles(self, device: torch.device) -> Tensor:
        table = torch.tensor(self.alphas_cumprod, dtype=torch.float64, device=device)
        return torch.atan2((1 - table).sqrt(), table.sqrt())

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angles = self._angles(t.device)
        position = t.double().clamp(0, 1) * (len(angles) - 1)
        index = position.floor().long().clamp(max=len(angles) - 2)
        angle = torch.lerp(angles[index], angles[index + 1], position - index)
        return angle.cos().float(), angle.sin().float()

    def time(self, noise_to_signal: Tensor) -> Tensor:
        angles = self._angles(noise_to_signal.device)
        angle = noise_to_signal.double().atan().clamp(angles[0], angles[-1])
        index = torch.searchsorted(angles, angle.contiguous()).clamp(1, len(angles) - 1)
        return (index - 1 + (angle - angles[index - 1]) / (angles[index] - angles[index - 1])) / (len(angles) - 1)

    def label(self, t: Tensor) -> Tensor:
        """The timestep, 0 .. N - 1."""
        return (t.double() * (len(self.alphas_cumprod) - 1)).float()


class RectifiedFlow(Schedule):
    """Straight lines between data and noise (Liu et al. 2023, arXiv 2209.03003):

        alpha_t = 1 - u,   sigma_t = u    with u = s t / (1 + (s - 1) t)

    and the resolution shift s of Esser et al. 2024 (arXiv 2403.03206, eq. 23).
    """

    kind: Literal["flow"] = "flow"
    shift: float = Field(1.0, gt=0)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        u = self.shift * t / (1 + (self.shift - 1) * t)
        return (1 - u).float(), u.float()

    def time(self, noise_to_signal: Tensor) -> Tensor:
        ratio = noise_to_signal.double()
        u = torch.where(ratio.isinf(), 1.0, ratio / (1 + ratio))
        return u / (self.shift - (self.shift - 1) * u)

    def label(self, t: Tensor) -> Tensor:
        """Timestep of diffusers' flow transformers, 1000 u."""
        return 1000 * self.alpha_sigma(t)[1]


ScheduleSpec = Annotated[Karras | Discrete | RectifiedFlow, Field(discriminator="kind")]


def scaled_linear_alphas_cumprod(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> tuple[float, ...]:
    """Table of Stable Diffusion and SDXL: √beta is linear from √start to √end (Rombach et al. 2022)."""
    betas = torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
    return tuple((1 - betas).cumprod(0).tolist())


class UniformTime(_Record):
    """Times uniform over a part of the grid: DMD's and DMD2's "2 to 98 % of T", SiD's "0 to t_max"."""

    kind: Literal["uniform"] = "uniform"
    low: float = Field(0.02, ge=0, le=1)
    """Cleanest time."""
    high: float = Field(0.98, ge=0, le=1)
    """Noisiest time."""
    steps: int | None = Field(1000, gt=1)
    """Draw whole indices of a grid of this many steps, both ends included; null draws real numbers."""

    @model_validator(mode="after")
    def _ordered(self) -> UniformTime:
        if self.high <= self.low:
            raise ValueError(f"`high` must be above low {self.low}, got {self.high}")
        return self

    def draw(self, count: int, schedule: Schedule) -> Tensor:
        """Times [count], float64, from torch's global generator."""
        if self.steps is None:
            return self.low + (self.high - self.low) * torch.rand(count, dtype=torch.float64)
        first, last = round(self.low * self.steps), min(round(self.high * self.steps), self.steps - 1)
        return torch.randint(first, last + 1, (count,)).double() / (self.steps - 1)


class LogNormalNoise(_Record):
    """Normally distributed ln(sigma / alpha): EDM's training law (Karras et al. 2022, table 1), also that of SiD's fake score.

    Draws beyond the ends of a table count at these ends: 2.6 % of them at the clean end of Stable Diffusion's table, with
    the default mean and deviation.
    """

    kind: Literal["lognormal"] = "lognormal"
    mean: float = -1.2
    """Mean of ln sigma."""
    std: float = Field(1.2, gt=0)
    """Standard deviation of ln sigma."""

    def draw(self, count: int, schedule: Schedule) -> Tensor:
        """Times [count], float64, from torch's global generator."""
        return schedule.time((self.mean + self.std * torch.randn(count, dtype=torch.float64)).exp())


NoiseLaw = Annotated[UniformTime | LogNormalNoise, Field(discriminator="kind")]


def ddim_step(schedule: Schedule, x: Tensor, x_t: Tensor, t: Tensor, to: Tensor) -> Tensor:
    """Deterministic DDIM step from time t to `to` (Song et al. 2021, arXiv 2010.02502, eq. 12 with sigma = 0):

        x_to = alpha_to x + sigma_to eps    with eps = (x_t - alpha_t x) / sigma_t

    For a flow model this is an Euler step.

    Args:
        schedule: schedule of the denoiser that predicted `x`.
        x: D(x_t, t), [B, ...].
        x_t: noisy samples, shape of `x`.
        t: their times [B]; sigma_t must be above 0.
        to: target times [B].

    Returns:
        Noisy samples at `to`, shape of `x`.
    """
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    alpha_to, sigma_to = schedule.alpha_sigma(to)
    ratio = sigma_to / sigma_t
    return unsqueeze_as(ratio, x) * x_t + unsqueeze_as(alpha_to - alpha_t * ratio, x) * x
