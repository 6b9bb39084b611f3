"""Seeds, noise, prompts, batches and progress of the library's sampling."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Iterable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from fewstep.students.sample import FewStep, ManyStep, noise_of, parse_seeds
from fewstep.system.console import Progress
from fewstep.system.errors import SettingsError
from fewstep.teachers import Codec

__all__ = ["FromNoise", "Patience", "fitting_batch", "prompts_of", "seeds_of"]

PATIENCE = 3.0  # seconds without a progress bar
MOST = 250  # pictures per batch
NUMBERS = 2**22  # of a batch's pictures


def fitting_batch(shape: tuple[int, ...]) -> int:
    """Pictures per batch for pictures of a shape: 250 small ones, one of 1024x1024."""
    return max(1, min(MOST, NUMBERS // max(1, math.prod(shape))))


def prompts_of(prompts: str | Sequence[str] | None) -> list[str]:
    """Read prompts as a list.

    Raises:
        SettingsError: none, or an empty one.
    """
    if prompts is None:
        return []
    found = [prompts] if isinstance(prompts, str) else list(prompts)
    if not found or not all(isinstance(prompt, str) and prompt.strip() for prompt in found):
        raise SettingsError(f"`prompts` must be one or more texts, got {prompts!r}. Try: prompts='a cat'")
    return found


def seeds_of(seeds: int | str | Iterable[int] | None, noise: Tensor | None, usual: int) -> list[int]:
    """Read seeds as a list; of given noise, the numbers of its samples.

    Raises:
        SettingsError: not whole numbers from 0, or seeds as well as noise.
    """
    if noise is not None:
        if seeds is not None:
            raise SettingsError("`noise` and `seeds` must not be given together. Try: leave one of them out")
        return list(range(noise.shape[1]))
    if seeds is None:
        return list(range(usual))
    if isinstance(seeds, str):
        return parse_seeds(seeds)
    try:
        found = [operator.index(seed) for seed in (seeds if isinstance(seeds, Iterable) else [seeds])]
    except TypeError:
        found = [-1]
    if any(not 0 <= seed < 2**63 for seed in found):
        raise SettingsError(f"`seeds` must be whole numbers of at least 0, got {seeds!r}. Try: seeds=range(16)")
    return found


class FromNoise:
    """Sampler that starts from given noise; a seed is the number of a sample.

    Args:
        sampler: the model's own sampler.
        noise: [steps, N, *shape]. Steps that it lacks are drawn from the number of the sample.
        device: of the networks.
    """

    def __init__(self, sampler: FewStep | ManyStep, noise: Tensor, device: torch.device) -> None:
        self.sampler, self.noise, self.device = sampler, noise, device
        self.calls = sampler.calls
        self.codec: Codec | None = sampler.codec

    @staticmethod
    def check(noise: Tensor, shape: tuple[int, ...], calls: int) -> Tensor:
        """Return noise as [steps, N, *shape].

        Raises:
            SettingsError: another shape, or numbers that are not finite.
        """
        if not isinstance(noise, Tensor) or tuple(noise.shape[-len(shape) :]) != tuple(shape):
            got = list(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
            raise SettingsError(f"`noise` must be a tensor [N, {', '.join(map(str, shape))}], got {got}")
        found = noise[None] if noise.ndim == len(shape) + 1 else noise
        if found.ndim != len(shape) + 2 or not 1 <= len(found) <= calls:
            raise SettingsError(
                f"`noise` must be [N, *shape] or [calls, N, *shape] with at most {calls} call(s), got {list(noise.shape)}"
            )
        if not torch.isfinite(found).all():
            raise SettingsError("`noise` must be finite, got NaN or infinity. Try: torch.randn")
        return found.float().cpu()

    def __call__(self, seeds: Sequence[int], shape: tuple[int, ...], **cond: Tensor) -> Tensor:
        rows = list(self.noise[:, list(seeds)])

        def at(step: int) -> Tensor:
            return rows[step].to(self.device) if step < len(rows) else noise_of(seeds, shape, step).to(self.device)

        if isinstance(self.sampler, FewStep):
            samples = self.sampler.generator([at(step) for step in range(self.calls)], **cond)
        else:
            samples = self.sampler.solver(
                self.sampler.denoiser, at(0), self.calls, lambda step: noise_of(seeds, shape, step + 1), **cond
            )
        return self.codec.decode(samples) if self.codec else samples


class Patience:
    """A progress bar that appears only if the work takes longer than a few seconds."""

    def __init__(self, description: str, total: int, after: float = PATIENCE) -> None:
        self.description, self.total, self.after = description, total, after
        self._bar: Progress | None = None

    def __enter__(self) -> Patience:
        self._started = time.monotonic()
        return self

    def update(self, done: int) -> None:
        """Report the pictures done."""
        if self._bar is None and done < self.total and time.monotonic() - self._started > self.after:
            self._bar = Progress(self.description, self.total, done).__enter__()
        if self._bar is not None:
            self._bar.update(done)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)
