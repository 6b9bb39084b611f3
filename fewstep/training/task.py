"""The interface between the training loop and its tasks: updates, micro-batches, seeds, advice after divergence."""

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


# first parts of the names of numbers that must be finite for training to continue
VITAL = ("loss", "gradient_norm", "x_gradient")


class Diverged(UserError):
    """A loss, gradient or weight is not finite; the last good checkpoint is kept."""


class Micro:
    """One micro-batch of an update: its position in the run, and that of this process's next one, if known."""

    def __init__(self, position: int, size: int, seed: int, then: int | None = None) -> None:
        self.position, self.size, self.seed, self.then = position, size, seed, then

    def reseed(self, phase: str) -> None:
        """Set torch's random state for a phase of this micro-batch ("generator", "critic", ...)."""
        seed_all(self.seed, phase, self.position)


def seed_all(*parts: object) -> None:
    """Set torch's global random state from any names and numbers, on every device."""
    seed = derived_seed(*parts)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # `manual_seed` formats a stack trace per absent device type: a fifth of a small network's update
        torch.default_generator.manual_seed(seed)


def derived_seed(*parts: object) -> int:
    """Derive a 63-bit seed from any names and numbers."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def cure(specs: Mapping[str, OptimSpec], bf16: bool) -> str:
    """Advice for optimizers whose networks diverged, without the steps already taken.

    Args:
        specs: settings of the optimizers by path, such as `optim.critic`.
        bf16: whether the networks run in bfloat16.
    """
    steps = []
    for where, spec in specs.items():
        steps.append(f"lower the learning rate {where}.lr (now {spec.lr:g}; try a tenth)")
        if spec.clip is None:
            steps.append(f"set {where}.clip 10")
    if bf16:
        steps.append("set train.precision fp32 to see whether rounding is the cause")
    return "Try: " + ", ".join(steps)


class Task(ABC):
    """Something that can be trained: its update, evaluation, pictures and state.

    Attributes:
        sharded: whether the networks are split over the processes, which must then run every step together.
        data: fingerprint of the training images, if any.
        inputs: fingerprints of the other inputs, by the setting that names their path.
        watch: the trainer's callback within `evaluate` and `picture`; in `evaluate` every process calls it alike.
    """

    sharded: bool = False
    data: str | None = None
    inputs: Mapping[str, str] = {}
    health: Any = None
    """A `fewstep.training.health.Health`, whose warnings follow an evaluation and which may end the run; None for none."""
    watch: Callable[[str], None] = staticmethod(lambda doing: None)
    """Called between the parts of an evaluation or of pictures with a progress text; shows it, or raises to abandon."""

    @abstractmethod
    def update(self, images: int, micros: list[Micro]) -> dict[str, Any]:
        """Run one update on the micro-batches, after `images` images; returns numbers or scalar tensors to log."""

    @abstractmethod
    def evaluate(self, images: int) -> dict[str, Any]:
        """Score the averaged weights; called on all processes. `fewstep.evaluation.metrics.merit` selects the best checkpoint."""

    @abstractmethod
    def picture(self, images: int, folder: Path) -> dict[str, Path]:
        """Draw pictures into `folder`; returns name -> PNG. Called on rank 0 only, or on all if sharded: rank 0 writes."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """State for resuming the run."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""

    @abstractmethod
    def export(self, folder: Path, images: int, scores: dict[str, Any]) -> None:
        """Write the averaged weights as a model file. Called on rank 0 only, or on all if sharded: rank 0 writes."""

    def destination(self, path: Sequence[str]) -> torch.Tensor | None:
        """Tensor to read a missing entry of `state_dict` into; None for a new one on the CPU."""
        return None

    def nonfinite(self) -> str | None:
        """Name of a trained or averaged weight that is not finite; called on all processes."""
        return None

    def cure(self, names: Sequence[str]) -> str:
        """Advice for a run in which the numbers or weights `names` are not finite."""
        return "Start a new run with a lower learning rate and another --out"

    def advise(self, stats: dict[str, float]) -> Iterator[tuple[str, str]]:
        """Yield warnings (code, text with advice) for the logged numbers."""
        return iter(())
