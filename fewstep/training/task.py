"""The interface between the training loop and what it trains: tasks, micro-batches, seeds, advice at divergence."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fewstep.system.errors import UserError
from fewstep.training.optim import OptimSpec

__all__ = ["Diverged", "Micro", "Task", "cure", "derived_seed", "seed_all"]


# first parts of the names of numbers without which training cannot go on
VITAL = ("loss", "gradient_norm", "x_gradient")


class Diverged(UserError):
    """Training left the finite numbers; the last good checkpoint is kept."""


class Micro:
    """One micro-batch of one update: where it lies in the run, and where this process's next one does, if that is known."""

    def __init__(self, position: int, size: int, seed: int, then: int | None = None) -> None:
        self.position, self.size, self.seed, self.then = position, size, seed, then

    def reseed(self, phase: str) -> None:
        """Set torch's random state for one phase of this micro-batch ("generator", "critic", ...)."""
        seed_all(self.seed, phase, self.position)


def seed_all(*parts: object) -> None:
    """Set torch's global random state from any names and numbers, on every device."""
    seed = derived_seed(*parts)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # `manual_seed` formats a stack trace for each kind of device that is not there: a fifth of a small network's update
        torch.default_generator.manual_seed(seed)


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from any names and numbers."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def cure(specs: Mapping[str, OptimSpec], bf16: bool) -> str:
    """Advice for optimizers whose networks diverged: what of it is not done yet.

    Args:
        specs: their settings by path, such as `optim.critic`.
        bf16: whether the networks run in bfloat16.
    """
    steps = []
    for where, spec in specs.items():
        steps.append(f"lower the learning rate {where}.lr (now {spec.lr:g}; try a tenth)")
        if spec.clip is None:
            steps.append(f"set {where}.clip 10")
    if bf16:
        steps.append("set train.precision fp32, to see whether rounding is the cause")
    return "Try: " + ", ".join(steps)


class Task(ABC):
    """Something that can be trained: what one update is, and what its result is worth.

    Attributes:
        sharded: whether its networks are split over the processes, which must then do everything together.
        data: fingerprint of the images it is trained on, if there are any.
        inputs: fingerprint of whatever else it is made from, by the setting that names its place.
        watch: what the trainer wants to be called within `evaluate` and `picture`, on every process alike in `evaluate`.
    """

    sharded: bool = False
    data: str | None = None
    inputs: Mapping[str, str] = {}
    watch: Callable[[str], None] = staticmethod(lambda doing: None)
    """Called between the parts of an evaluation or of pictures, with what is being done: it shows that, or raises to leave."""

    @abstractmethod
    def update(self, images: int, micros: list[Micro]) -> dict[str, Any]:
        """One update on the given micro-batches, `images` seen before it. Returns numbers or scalar tensors to log."""

    @abstractmethod
    def evaluate(self, images: int) -> dict[str, Any]:
        """Score the averaged weights; called on all processes. `fewstep.evaluation.metrics.merit` chooses the best checkpoint."""

    @abstractmethod
    def picture(self, images: int, folder: Path) -> dict[str, Path]:
        """Draw what there is to see into `folder`; returns name -> PNG. Called on rank 0 only, on all if sharded: rank 0
        writes."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""

    @abstractmethod
    def export(self, folder: Path, images: int, scores: dict[str, Any]) -> None:
        """Write the averaged weights for people. Called on rank 0 only, on all if sharded: rank 0 writes."""

    def destination(self, path: Sequence[str]) -> torch.Tensor | None:
        """Tensor that an entry of `state_dict` which does not exist yet is read into; None for a new one on the CPU."""
        return None

    def nonfinite(self) -> str | None:
        """Name of a trained or averaged weight that is not finite; called on all processes."""
        return None

    def cure(self, names: Sequence[str]) -> str:
        """Advice for a run in which the numbers or weights `names` stopped being finite."""
        return "Begin a new run with a lower learning rate and another --out"

    def advise(self, stats: dict[str, float]) -> Iterator[tuple[str, str]]:
        """Warnings (code, text with advice) that these logged numbers call for."""
        return iter(())
