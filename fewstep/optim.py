"""One network's optimizer: learning rate over images, accumulation, clipping. Knows no loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fewstep import distributed

__all__ = ["OptimSpec", "Stepper"]


class OptimSpec(BaseModel):
    """Settings of one network's optimizer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["adam", "adamw"] = "adamw"
    """Adam (SiD) or AdamW (DMD, DMD2)."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the two moments."""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    warmup: int = Field(0, ge=0)
    """Images over which the learning rate rises linearly from 0."""
    decay_from: float = Field(1.0, ge=0, le=1)
    """Share of the run after which the learning rate falls linearly to 0; 1 keeps it constant."""
    clip: float | None = Field(None, gt=0)
    """Largest gradient norm; longer gradients are scaled down. None: no clipping."""

    def factor(self, images: int, total: int) -> float:
        """The learning rate's factor after `images` of `total`."""
        warm = min(1.0, images / self.warmup) if self.warmup else 1.0
        start = self.decay_from * total
        # a run ends at the first whole batch: images may exceed the total
        fall = 1.0 if images <= start or start == total else max(0.0, (total - images) / (total - start))
        return warm * fall


class Stepper:
    """An optimizer over one or more modules that form one player.

    Args:
        spec: its settings.
        modules: the modules it trains (parameters without gradients are left alone).
        total: images of the whole run, for the decay.
    """

    def __init__(self, spec: OptimSpec, modules: list[nn.Module], total: int) -> None:
        self.spec, self.total = spec, total
        self.parameters = [p for module in modules for p in module.parameters()]
        common = dict(lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)
        if spec.kind == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                self.parameters, weight_decay=spec.weight_decay, **common
            )
        else:
            self.optimizer = torch.optim.Adam(self.parameters, weight_decay=spec.weight_decay, **common)

    def step(self, images: int) -> Tensor:
        """Apply the accumulated gradients; returns their norm before clipping (a scalar, not synchronised).

        Args:
            images: images seen after this step, for warm-up and decay.
        """
        distributed.average_gradients(self.parameters)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)  # over all shards, if parameters are split
        if self.spec.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.spec.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec.lr * self.spec.factor(images, self.total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def blank(self, number: int, name: str) -> Tensor | None:
        """Where a split parameter's state `name` is to be read to: this process's part; None for anything else."""
        parameter = self.parameters[number]
        return torch.zeros_like(parameter) if isinstance(parameter, DTensor) and name != "step" else None

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the optimizer's state."""
        self.optimizer.load_state_dict(state)
