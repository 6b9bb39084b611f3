"""Classifier-free guidance as a denoiser, and the rules that limit it: to an interval of noise, and in contrast.

A rule combines the two predictions of a network. Rules wrap each other, so every method and every sampler that takes a
guided teacher takes all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Cond, Denoiser
from fewstep.diffusion.noise import unsqueeze_as

__all__ = ["Guided", "Interval", "Rescaled", "Rule", "Scale", "as_rule", "guidance_rule", "plain"]


class Rule(ABC):
    """Interface of a rule: combines D_cond and D_null to the guided prediction."""

    scale: float
    """Guidance scale; 1 is no guidance."""

    @abstractmethod
    def __call__(self, conditional: Tensor, unconditional: Tensor, ratio: Tensor) -> Tensor:
        """Combine two predictions [B, ...] at noise-to-signal ratios sigma_t / alpha_t [B]."""

    @abstractmethod
    def acts(self, ratio: Tensor) -> Tensor:
        """Return whether the rule needs D_null at these ratios: bool [B]."""


@dataclass(frozen=True)
class Scale(Rule):
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, eq. 6):

        D = D_null + scale (D_cond - D_null)

    Guiding x0 equals guiding eps or v, because each is an affine function of the others.
    """

    scale: float

    def __call__(self, conditional: Tensor, unconditional: Tensor, ratio: Tensor) -> Tensor:
        return unconditional + self.scale * (conditional - unconditional)

    def acts(self, ratio: Tensor) -> Tensor:
        return torch.ones_like(ratio, dtype=torch.bool)

    def __str__(self) -> str:
        return f"{self.scale:g}"


@dataclass(frozen=True)
class Interval(Rule):
    """Guidance at noise levels within an interval alone (Kynkäänniemi et al. 2024, arXiv 2404.07724, eq. 4):

        D = rule(D_cond, D_null) if low < sigma_t / alpha_t <= high, else D_cond

    Guidance at high noise costs variety, and at low noise it costs calls without a benefit. Where no sample of a batch is
    within, the network runs once.
    """

    rule: Rule
    low: float
    high: float

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.rule.scale

    def __call__(self, conditional: Tensor, unconditional: Tensor, ratio: Tensor) -> Tensor:
        within = unsqueeze_as(self.acts(ratio), conditional)
        return torch.where(within, self.rule(conditional, unconditional, ratio), conditional)

    def acts(self, ratio: Tensor) -> Tensor:
        return (self.low < ratio) & (ratio <= self.high)

    def __str__(self) -> str:
        return f"{self.rule} within {self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Rescaled(Rule):
    """Guidance without its gain in contrast (Lin et al. 2023, arXiv 2305.08891, section 3.4):

        D = share (std D_cond / std D_g) D_g + (1 - share) D_g,   D_g = rule(D_cond, D_null)

    with the standard deviation over all values of a sample. The paper's share is 0.7. It rescales the network's output, whose
    scale depends on what it predicts; this rescales x0, which all denoisers here have.
    """

    rule: Rule
    share: float

    @property
    def scale(self) -> float:  # type: ignore[override]
        return self.rule.scale

    def __call__(self, conditional: Tensor, unconditional: Tensor, ratio: Tensor) -> Tensor:
        guided = self.rule(conditional, unconditional, ratio)
        wanted, found = (value.flatten(1).std(1) for value in (conditional, guided))
        factor = 1 + self.share * (wanted / found.clamp(min=1e-12) - 1)  # a constant picture has no contrast to keep
        return unsqueeze_as(factor, guided) * guided

    def acts(self, ratio: Tensor) -> Tensor:
        return self.rule.acts(ratio)

    def __str__(self) -> str:
        return f"{self.rule} rescaled {self.share:g}"


def guidance_rule(
    scale: float | None, interval: tuple[float, float] | None = None, rescale: float = 0.0, prefix: str = "guidance"
) -> Rule | None:
    """Build a rule from settings; None without guidance (scale None or 1).

    Args:
        scale: guidance scale.
        interval: least and largest noise-to-signal ratio at which it acts; None: at all.
        rescale: share of `Rescaled`; 0 for none.
        prefix: start of the settings' names, for messages.

    Raises:
        ValueError: a number out of range, or an interval or rescale without guidance.
    """
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(f"`{prefix}` must be a number of at least 0, got {scale}. Try: 7.5, or leave it out")
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(
            f"`{prefix}_interval` must be two rising noise levels of at least 0, got {list(interval)}. Try: [0.3, 5]"
        )
    if not 0 <= rescale <= 1:
        raise ValueError(f"`{prefix}_rescale` must be between 0 and 1, got {rescale}. Try: 0.7")
    if scale is None or scale == 1:
        for name, given in (("interval", interval), ("rescale", rescale or None)):
            if given is not None:
                raise ValueError(
                    f"`{prefix}_{name}` must come with `{prefix}` other than 1, got {given} and {scale}. Try: {prefix} 3"
                )
        return None
    rule: Rule = Scale(scale)
    if interval is not None:
        rule = Interval(rule, *interval)
    return Rescaled(rule, rescale) if rescale else rule


def as_rule(guidance: Rule | float | None) -> Rule | None:
    """Rule of a number, which is a scale; None for 1."""
    return guidance if guidance is None or isinstance(guidance, Rule) else guidance_rule(guidance)


def plain(guidance: Rule | float | None) -> float | str | None:
    """Guidance for a record in JSON: its scale, or the words of a rule with limits."""
    return guidance.scale if isinstance(guidance, Scale) else str(guidance) if isinstance(guidance, Rule) else guidance


class Guided(Denoiser):
    """A denoiser with classifier-free guidance. Both predictions run through the network in one batch.

    Args:
        denoiser: the conditional denoiser.
        null: maps a condition to the empty condition of the same batch.
        rule: how the predictions combine; a number is a plain `Scale`.
    """

    def __init__(self, denoiser: Denoiser, null: Callable[[Cond], Cond], rule: Rule | float) -> None:
        super().__init__()
        self.denoiser, self.null = denoiser, null
        self.rule = rule if isinstance(rule, Rule) else Scale(rule)
        self.schedule = denoiser.schedule

    @property
    def scale(self) -> float:
        """Guidance scale."""
        return self.rule.scale

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        if isinstance(self.rule, Scale):
            return self.rule(*self.halves(x_t, t, cond), t)  # acts alike at every ratio
        if t.device.type != "meta" and not self.rule.acts(self.ratio(t)).any():  # `plan` counts the dearer case
            return self.denoiser(x_t, t, **cond)
        return self.combine(*self.halves(x_t, t, cond), t)

    def combine(self, conditional: Tensor, unconditional: Tensor, t: Tensor) -> Tensor:
        """Combine the predictions [B, ...] at times [B]."""
        return self.rule(conditional, unconditional, self.ratio(t).to(conditional.device))

    def ratio(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratios sigma_t / alpha_t of times [B]; infinite for pure noise."""
        alpha_t, sigma_t = self.schedule.alpha_sigma(t)
        return sigma_t / alpha_t

    def halves(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        """Compute D_cond and D_null [B, ...] in one forward, for methods that treat guidance as a term of its own."""
        both = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), **self._both(cond))
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional

    def residual(self, x: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        assert isinstance(self.rule, Scale), "only plain guidance is an affine function of the residuals"
        twice = (torch.cat([value, value]) for value in (x, t, eps))
        conditional, unconditional = self.denoiser.residual(*twice, **self._both(cond)).chunk(2)
        return self.rule(conditional, unconditional, t)  # affine: the weights 1 - scale and scale sum to 1

    def _both(self, cond: Cond) -> dict[str, Tensor]:
        empty = self.null(cond)
        return {name: torch.cat([cond[name], empty[name]]) for name in cond}
