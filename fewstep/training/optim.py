"""A network's optimizer: learning-rate schedule in images, gradient averaging, clipping. Knows no loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fewstep.system import distributed
from fewstep.system.errors import SettingsError
from fewstep.system.record import Record
from fewstep.training.offload import HostWeights

__all__ = ["OptimSpec", "Stepper", "check_offload"]


class OptimSpec(Record):
    """Settings of one network's optimizer."""

    kind: Literal["adam", "adamw", "adamw8bit"] = "adamw"
    """Adam (SiD), AdamW (DMD, DMD2), or AdamW with 8-bit moments in blocks of 256 (Dettmers et al. 2021, arXiv
    2110.02861; needs the extra `lowbit`), a quarter of the memory."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam's decay rates of the two moments."""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon."""
    first_moment: bool = True
    """false: do not store the first moment, which equals the gradient if the first of `betas` is 0. Saves 4 bytes per
    parameter with the same steps up to rounding. On a CPU the optimizer takes twice as long: PyTorch has no fused kernel."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    warmup: int = Field(0, ge=0)
    """Images over which the learning rate rises linearly from 0."""
    decay_from: float = Field(1.0, ge=0, le=1)
    """Share of the run after which the learning rate decays linearly to 0; 1 keeps it constant."""
    clip: float | None = Field(None, gt=0)
    """Largest gradient norm; larger gradients are scaled down. null: no clipping."""

    @model_validator(mode="after")
    def _moments(self) -> OptimSpec:
        if not self.first_moment and (self.betas[0] != 0 or self.kind == "adamw8bit"):
            raise ValueError(
                f"first_moment must be true unless kind is adam or adamw with a first beta of 0, got false for {self.kind} with "
                f"{self.betas[0]:g}. Try: leave it out"
            )
        return self

    def factor(self, images: int, total: int) -> float:
        """Factor of the learning rate after `images` of `total`."""
        warm = min(1.0, images / self.warmup) if self.warmup else 1.0
        start = self.decay_from * total
        # a run ends at the first whole batch: images may exceed the total
        fall = 1.0 if images <= start or start == total else max(0.0, (total - images) / (total - start))
        return warm * fall


def check_offload(*specs: OptimSpec) -> None:
    """Refuse `train.offload` if it cannot work, before anything large is loaded.

    Raises:
        SettingsError: several processes, or 8-bit moments.
    """
    if distributed.world_size() > 1:
        raise SettingsError(
            "`train.offload` must be false with several processes, got true. Try: split the networks (train.mesh.shard)"
        )
    if any(spec.kind == "adamw8bit" for spec in specs):
        raise SettingsError("`train.offload` must be false with kind adamw8bit, got true. Try: kind adamw")


class Stepper:
    """An optimizer over one or more modules that are stepped together.

    Args:
        spec: the optimizer's settings.
        modules: the modules to train; parameters without gradients are not changed.
        total: images of the whole run, for the decay.
        offload_from: keep float32 weights and moments in host memory instead of on this device, and step there.

    Attributes:
        parameters: parameters to step, in the order of the modules': the modules' own, or their copies in host memory.

    Raises:
        SettingsError: 8-bit moments without torchao, in host memory, or on a network that is split over processes.
    """

    def __init__(
        self, spec: OptimSpec, modules: list[nn.Module], total: int, offload_from: torch.device | None = None
    ) -> None:
        self.spec, self.total = spec, total
        if offload_from is not None:
            check_offload(spec)
        self.host = HostWeights(modules, offload_from) if offload_from is not None else None
        self.parameters: list[nn.Parameter] = [p for module in modules for p in module.parameters()]
        if self.host is not None:
            self.parameters = self.host.weights
        common: dict[str, Any] = dict(lr=spec.lr, betas=spec.betas, eps=spec.eps, weight_decay=spec.weight_decay)
        self.optimizer: torch.optim.Optimizer
        if not spec.first_moment:
            self.optimizer = torch.optim.RMSprop(self.parameters, spec.lr, spec.betas[1], spec.eps)
        elif spec.kind == "adamw":
            self.optimizer = torch.optim.AdamW(self.parameters, fused=True, **common)
        elif spec.kind == "adam":
            self.optimizer = torch.optim.Adam(self.parameters, fused=True, **common)
        else:
            if any(isinstance(parameter, DTensor) for parameter in self.parameters):
                raise SettingsError("kind must not be adamw8bit for split networks (train.mesh.shard). Try: kind adamw")
            self.optimizer = _torchao().AdamW8bit(self.parameters, **common)

    def step(self, images: int) -> Tensor:
        """Apply the accumulated gradients; returns their norm before clipping (a scalar, not synchronised).

        Args:
            images: images seen after this step, for warm-up and decay.
        """
        norm = self._norm()
        if self.spec.clip is not None and (self.host is None or norm > self.spec.clip):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.spec.clip, norm)
        rate = self.spec.lr * self.spec.factor(images, self.total)
        if not self.spec.first_moment:
            rate = self._without_first_moment(rate)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        with self._eager():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.host is not None:
            self.host.give_weights()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _norm(self) -> Tensor:
        """Return the global gradient norm and move the gradients to the optimizer's device."""
        if self.host is not None:  # computed on the device, which is faster
            gradients = [p.grad for p in self.host.live if p.grad is not None]
            parts = torch._foreach_norm(gradients, 2, dtype=torch.float32)
            norm = torch.linalg.vector_norm(torch.stack(parts))
            self.host.fetch_gradients()
            return norm.cpu()
        distributed.average_gradients(self.parameters)
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])  # of all shards

    @torch.no_grad()
    def _without_first_moment(self, rate: float) -> float:
        """Set up RMSprop for Adam's next step with beta1 = 0 (Kingma and Ba 2015, algorithm 1); returns its learning rate.

        Adam:     rate g / (sqrt(v) / c + eps) = (c rate) g / (sqrt(v) + c eps)    c = sqrt(1 - beta2^k) in step k
        RMSprop:  rate g / (sqrt(v) + eps)
        """
        moved = [parameter for parameter in self.parameters if parameter.grad is not None]
        steps = {
            int(self.optimizer.state[parameter]["step"]) if self.optimizer.state[parameter] else 0
            for parameter in moved
        }
        if len(steps) > 1:
            raise SettingsError(
                "first_moment must be true if the parameters with gradients change between updates, got false. Try: leave it out"
            )
        taken = steps.pop() if steps else 0
        c = math.sqrt(1 - self.spec.betas[1] ** (taken + 1))
        for group in self.optimizer.param_groups:
            group["eps"] = self.spec.eps * c
        decay = self.spec.weight_decay
        if decay and self.spec.kind == "adamw":
            torch._foreach_mul_(list[Tensor](moved), 1 - rate * decay)
        elif decay:
            gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
            torch._foreach_add_(gradients, list[Tensor](moved), alpha=decay)
        return rate * c

    def state_of(self, module: nn.Module) -> dict[str, Tensor]:
        """State of one of the modules in full precision."""
        return module.state_dict() if self.host is None else self.host.state_of(module)

    def load_master_weights(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Update the float32 copies after one of the modules has loaded `state`."""
        if self.host is not None:
            self.host.load(module, state)

    def destination(self, number: int, name: str) -> Tensor | None:
        """Tensor for this process's part of a split parameter's state `name`; None for anything else."""
        parameter = self.parameters[number]
        return torch.zeros_like(parameter) if isinstance(parameter, DTensor) and name != "step" else None

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, in plain tensors."""
        state = self.optimizer.state_dict()
        parts = {
            number: {name: _plain(value) for name, value in values.items()} for number, values in state["state"].items()
        }
        return state | {"state": parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the optimizer's state."""
        parts = {
            number: {name: _quantised(value) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        self.optimizer.load_state_dict(state | {"state": parts})

    def _eager(self) -> AbstractContextManager[Any]:
        """Run torchao's update without compilation on a CPU, where compiling takes longer than it saves."""
        cpu = self.spec.kind == "adamw8bit" and self.parameters[0].device.type == "cpu"
        return torch.compiler.set_stance("force_eager") if cpu else nullcontext()


def _torchao() -> Any:
    try:
        import torchao.optim
    except ImportError:
        raise SettingsError(
            "`kind: adamw8bit` must have torchao, which is not installed. Try: pip install 'fewstep[lowbit]', or adamw"
        ) from None
    return torchao.optim


def _plain(value: Any) -> Any:
    """Split an 8-bit moment into plain tensors: codes, block scales, and the table of code values."""
    if not hasattr(value, "codes"):
        return value
    return {"codes": value.codes, "scale": value.scale, "qmap": value.qmap, "signed": value.signed}


def _quantised(value: Any) -> Any:
    """Invert `_plain`."""
    if not isinstance(value, dict):
        return value
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(value["codes"], value["scale"], value["qmap"], value["signed"], torch.float32)
