"""The teacher's samplers: solvers of the probability-flow ODE. They know no student.

EDM's Heun solver, deterministic or stochastic (Karras et al. 2022, arXiv 2206.00364, algorithms 1 and 2), Euler's, which is
DDIM (Song et al. 2021, arXiv 2010.02502), DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095) and UniPC (`unipc.py`). They work
for every teacher, because `View` gives any denoiser EDM's schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.noise import Karras, Schedule, double_device, unsqueeze_as
from fewstep.diffusion.unipc import unipc

__all__ = ["Churn", "Method", "Solver", "View", "edm_view"]

Method = Literal["heun", "euler", "dpmpp-2m", "unipc-2", "unipc-3", "unipc-2-bh1", "unipc-3-bh1"]


class View(Denoiser):
    """A denoiser under another schedule: the same network, called at the time of equal noise-to-signal ratio.

        D_view(x_t, t) = D(c x_t, t')    with sigma_t' / alpha_t' = sigma_t / alpha_t,   c = alpha_t' / alpha_t

    At equal ratios x_t and x_t' differ only by the scale c (Karras et al. 2022, section 2), so VP and VE parametrisations
    are the same model.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, schedule

    def _translate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_t, sigma_t = self.schedule.alpha_sigma(t)
        own_t = self.denoiser.schedule.time(sigma_t.double() / alpha_t.double())
        own_alpha, own_sigma = self.denoiser.schedule.alpha_sigma(own_t)
        # at equal ratios the norms of (alpha, sigma) give the scale without a division by alpha, which may be zero
        return own_t, (own_alpha**2 + own_sigma**2).sqrt() / (alpha_t**2 + sigma_t**2).sqrt()

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        own_t, scale = self._translate(t)
        return self.denoiser(unsqueeze_as(scale, x_t) * x_t, own_t, **cond)

    def residual(self, x: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        return self.denoiser.residual(x, self._translate(t)[0], eps, **cond)


class Churn(NamedTuple):
    """Noise that the stochastic sampler adds before each step (algorithm 2: S_churn, S_tmin, S_tmax, S_noise).

    EDM's values for ImageNet-64 with 511 evaluations (table 5): Churn(40, 0.05, 50, 1.003).
    """

    amount: float
    """S_churn: before a step, sigma grows by the factor 1 + amount / steps, at most √2."""
    low: float = 0.0
    """S_tmin: steps that start below this sigma add no noise."""
    high: float = math.inf
    """S_tmax: steps that start above this sigma add no noise."""
    inflate: float = 1.0
    """S_noise: factor on the added noise, slightly above 1 against lost detail."""


def edm_view(denoiser: Denoiser) -> Denoiser:
    """Denoiser under a Karras schedule: its own, or a view with the same range of noise levels."""
    if isinstance(denoiser.schedule, Karras):
        return denoiser
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    alpha, sigma = denoiser.schedule.alpha_sigma(ends)
    low, high = (sigma / alpha).tolist()
    return View(denoiser, Karras(sigma_min=max(low, 0.002), sigma_max=min(high, 1000.0)))


@dataclass(frozen=True)
class Solver:
    """A solver of the probability-flow ODE with its grid of noise levels.

    The grid is sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, then 0 (Karras et al. 2022,
    eq. 5), of N steps.

    Attributes:
        method: `heun` takes 2N - 1 evaluations for N steps and is of second order; `euler` takes N and is of first;
            `dpmpp-2m` takes N and is of second order, because it reuses the evaluation before;
            `unipc-2` and `unipc-3` take N, with a predictor of that order and a corrector, B(h) = e^(-h) - 1, or -h with `-bh1`.
        sigma_min: least noise-to-signal ratio of the grid; None: the model's.
        sigma_max: largest; None: the model's.
        rho: curve of the grid; None: the model's (7 but for models of EDM with another).
        churn: settings of the stochastic solver, for `heun` alone.

    Raises:
        ValueError: a setting out of range, or churn for another method.
    """

    method: Method = "heun"
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    churn: Churn | None = None

    def __post_init__(self) -> None:
        given = [value for value in self.range if value is not None]
        low, high = self.sigma_min or 0.0, math.inf if self.sigma_max is None else self.sigma_max
        if not (all(0 < value < math.inf for value in given) and low < high):
            raise ValueError(
                "`sampler` must have 0 < sigma_min < sigma_max and rho above 0, got "
                f"{', '.join(map(_word, self.range))}. Try: dpmpp-2m,0.03,40,7"
            )
        if self.churn is not None and self.method != "heun":
            raise ValueError(
                f"`churn` must come with the sampler `heun`, got `{self.method}`. Try: leave one of them out"
            )

    @property
    def range(self) -> tuple[float | None, float | None, float | None]:
        """Least and largest noise level and curve of the grid; None: the model's."""
        return self.sigma_min, self.sigma_max, self.rho

    @property
    def usual(self) -> bool:
        """True for EDM's deterministic sampler with the model's own grid."""
        return self == Solver()

    def __str__(self) -> str:
        """Method and range, as the command line takes them; churn is an option of its own."""
        return ",".join([self.method, *(map(_word, self.range) if any(self.range) else ())])

    def grid(self, schedule: Karras, steps: int) -> tuple[Tensor, Tensor]:
        """Times and noise levels of the steps, [steps] each, float64, noisiest first.

        Args:
            schedule: EDM's, with the model's range (`edm_view`).
            steps: number of steps.

        Raises:
            ValueError: the grid leaves the model's range.
        """
        if not any(self.range):
            times = schedule.times(steps)
            return times, schedule.alpha_sigma(times)[1].double()
        least, most = schedule.sigma_min, schedule.sigma_max
        low, high, rho = self.sigma_min or least, self.sigma_max or most, self.rho or schedule.rho
        if not least * (1 - 1e-5) <= low < high <= most * (1 + 1e-5):
            raise ValueError(
                f"`sampler` must have noise levels within the model's {least:.4g} to {most:.4g}, got {low:g} to {high:g}. Try: leave "
                "them out"
            )
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        return schedule.time(sigmas).clamp(0, 1), sigmas

    def __call__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        evaluations: int,
        fresh: Callable[[int], Tensor] = lambda step: torch.empty(0),
        **cond: Tensor,
    ) -> Tensor:
        """Integrate from pure noise to a sample with a given number of network evaluations.

        With D_i = D(x_i, sigma_i), the slope d_i = (x_i - D_i) / sigma_i (eq. 1 and 3) and r = sigma_(i+1) / sigma_i:

            heun        x_(i+1) = x_i + (sigma_(i+1) - sigma_i) (d_i + d'_(i+1)) / 2     algorithm 1
            euler       x_(i+1) = r x_i + (1 - r) D_i
            dpmpp-2m    x_(i+1) = r x_i + (1 - r) ((1 + 1/2q) D_i - 1/2q D_(i-1))     Lu et al. 2022, algorithm 2, alpha = 1

        where d' is the slope at Euler's step, q = h_(i-1) / h_i and h_i = -log r_i. Heun's last step, to sigma = 0, has no
        correction, and with an even number of evaluations neither has its first; the same holds for the first and the last step
        of dpmpp-2m. UniPC's steps are in `fewstep.diffusion.unipc`. All arithmetic outside the network is in float64.

        Args:
            denoiser: the (possibly guided) teacher.
            noise: unit Gaussian [B, ...].
            evaluations: network calls, at least 1.
            fresh: step -> unit Gaussian [B, ...], called for each step that adds noise.
            cond: the condition, each tensor [B, ...].

        Returns:
            Samples [B, ...], float32.

        Raises:
            ValueError: `evaluations` is below 1, or the grid leaves the model's range.
        """
        if evaluations < 1:
            raise ValueError(f"`evaluations` must be at least 1, got {evaluations}. Try: 35, for EDM's 18 steps")
        view, device = edm_view(denoiser), double_device(noise.device)
        steps = evaluations // 2 + 1 if self.method == "heun" else evaluations
        times, levels = (values.to(device) for values in self.grid(cast(Karras, view.schedule), steps))
        sigmas = torch.cat([levels, torch.zeros(1, dtype=torch.float64, device=device)])

        def denoised(x: Tensor, time: Tensor) -> Tensor:
            return view(x.float().to(noise.device), time.expand(x.shape[0]), **cond).to(device).double()

        x = noise.to(device).double() * sigmas[0]
        if self.method == "heun":
            x = self._heun(x, times, sigmas, view.schedule, denoised, evaluations % 2 == 1, fresh)
        elif self.method in ("euler", "dpmpp-2m"):
            x = self._multistep(x, times, sigmas, denoised)
        else:
            _, order, *linear = self.method.split("-")
            x = unipc(x, times, sigmas, denoised, int(order), bool(linear))
        return x.float().to(noise.device)

    def _heun(
        self,
        x: Tensor,
        times: Tensor,
        sigmas: Tensor,
        schedule: Schedule,
        denoised: Callable[[Tensor, Tensor], Tensor],
        first: bool,
        fresh: Callable[[int], Tensor],
    ) -> Tensor:
        """Heun's steps, the first one corrected if `first`, with noise before each if there is churn (algorithm 2)."""
        churn, steps = self.churn, len(times)

        def slope(x: Tensor, time: Tensor, sigma: Tensor) -> Tensor:
            return (x - denoised(x, time)) / sigma

        for i in range(steps):
            time, sigma = times[i], sigmas[i]
            if churn is not None and churn.amount > 0 and churn.low <= sigma <= churn.high:
                sigma = sigma * (1 + min(churn.amount / steps, math.sqrt(2) - 1))
                time = schedule.time(sigma)
                added = (sigma**2 - sigmas[i] ** 2).sqrt()
                x = x + churn.inflate * added * fresh(i).to(x)
            step = sigmas[i + 1] - sigma
            here = slope(x, time, sigma)
            ahead = x + step * here
            corrected = i < steps - 1 and (i > 0 or first)
            x = x + step * (here + slope(ahead, times[i + 1], sigmas[i + 1])) / 2 if corrected else ahead
        return x

    def _multistep(
        self, x: Tensor, times: Tensor, sigmas: Tensor, denoised: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Steps of one evaluation each, extrapolated from the evaluation before if the method is `dpmpp-2m`."""
        before, h_before = None, 0.0
        for i, time in enumerate(times):
            here = towards = denoised(x, time)
            ratio = (sigmas[i + 1] / sigmas[i]).item()
            h = -math.log(ratio) if ratio else math.inf
            if self.method == "dpmpp-2m" and before is not None and ratio:
                half = h / h_before / 2
                towards = (1 + half) * here - half * before
            x, before, h_before = ratio * x + (1 - ratio) * towards, here, h
        return x


def _word(value: float | None) -> str:
    return "model" if value is None else f"{value:g}"
