"""Low-rank adapters on a shared, frozen network: one copy in memory serves as teacher, student and fake score.

An `Adapted` denoiser owns only its low-rank matrices. Hooks on the shared network's layers add its terms while it runs;
otherwise they add nothing, so the network is the teacher. Knows no file format (see `fewstep.students.export`).

    h = W x + (alpha / rank) B A x      Hu et al. 2021 (arXiv 2106.09685), section 4.1; A starts random, B at zero
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.preconditioned import Preconditioned, output_of
from fewstep.networks.quantized import is_quantized
from fewstep.system.errors import SettingsError
from fewstep.system.record import Record

__all__ = ["Adapted", "LoraSpec", "LowRank", "contexts", "merged"]

# The active adapter. A context variable, because backward passes recompute blocks in other threads (see `contexts`).
_ACTIVE: ContextVar[Adapted | None] = ContextVar("active adapter", default=None)

DMD2_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


class LoraSpec(Record):
    """Low-rank adapters. The defaults are those of DMD2's SDXL LoRA."""

    rank: int = Field(64, gt=0)
    """Width of the bottleneck."""
    alpha: float = Field(8.0, gt=0)
    """The term is scaled by alpha / rank."""
    targets: tuple[str, ...] = Field(DMD2_TARGETS, min_length=1)
    """Layers with adapters: linear layers and convolutions whose path is one of these, or ends in a dot and one of these."""

    def fits(self, name: str) -> bool:
        """Return whether the layer of this path gets an adapter."""
        return any(name == target or name.endswith(f".{target}") for target in self.targets)


class LowRank(nn.Module):
    """B A of one layer: `down` is A [rank, in, ...], `up` is B [out, rank, ...].

    Args:
        layer: a Linear, or a Conv2d without groups.
        spec: rank and scale.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, spec: LoraSpec) -> None:
        super().__init__()
        self.scale = spec.alpha / spec.rank
        if isinstance(layer, nn.Conv2d):
            down: tuple[int, ...] = (spec.rank, layer.in_channels, *layer.kernel_size)
            up: tuple[int, ...] = (layer.out_channels, spec.rank, 1, 1)
        else:
            down, up = (spec.rank, layer.in_features), (layer.out_features, spec.rank)
        device = next(layer.parameters()).device  # a quantised layer's `weight` is made at each access
        self.down = nn.Parameter(torch.empty(down, device=device))
        self.up = nn.Parameter(torch.zeros(up, device=device))
        nn.init.normal_(self.down, std=1 / spec.rank)

    def forward(self, x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
        """Compute the term to add to the output of `layer` for its input `x`."""
        # float32 at rest; computes in the shared weights' dtype
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            hidden = F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)
            return self.scale * F.conv2d(hidden, up)
        return self.scale * F.linear(F.linear(x, down), up)

    def product(self) -> Tensor:
        """Change of the layer's weight, in its shape."""
        return self.scale * (self.up.flatten(1) @ self.down.flatten(1)).reshape(len(self.up), *self.down.shape[1:])


class Adapted(Denoiser):
    """A shared denoiser with its own adapters. Its parameters and state are the adapters'.

    Args:
        base: the shared denoiser. It gets hooks that do nothing unless an `Adapted` runs it.
        spec: adapted layers, rank and scale.

    Raises:
        SettingsError: no layer has such a name.
    """

    base: Preconditioned

    def __init__(self, base: Preconditioned, spec: LoraSpec) -> None:
        super().__init__()
        self.schedule, self.spec = base.schedule, spec
        object.__setattr__(self, "base", base)  # not a sub-module: the weights belong to the teacher
        layers = {
            name: layer
            for name, layer in base.named_modules()
            if spec.fits(name)
            and (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1))
        }
        if not layers:
            leaves = sorted(
                {n.rsplit(".", 1)[-1] for n, m in base.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
            )
            raise SettingsError(
                f"`lora.targets` must name linear layers or convolutions, got {', '.join(spec.targets)}. Try some of: "
                f"{', '.join(leaves)}"
            )
        self.layers = nn.ModuleDict({name.replace(".", "|"): LowRank(layer, spec) for name, layer in layers.items()})
        for name, layer in layers.items():
            _listen(layer, name.replace(".", "|"))

    def forward(self, x_t: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        with self.running():
            return self.base(x_t, t, **cond)

    def running(self) -> AbstractContextManager[None]:
        """Context in which the shared network runs with these adapters."""
        return _active(self)

    def residual(self, x: Tensor, t: Tensor, eps: Tensor, **cond: Tensor) -> Tensor:
        return output_of(self, self.schedule.perturb(x, t, eps), t, cond) - self.base.target(x, t, eps)

    def get_submodule(self, target: str) -> nn.Module:
        """Find a layer of the shared denoiser, for reading features."""
        return self.base.get_submodule(target)

    def adapters(self) -> dict[str, LowRank]:
        """Adapters by the path of their layer within the denoiser."""
        return {name.replace("|", "."): cast(LowRank, layer) for name, layer in self.layers.items()}

    def __deepcopy__(self, memo: dict[int, object]) -> Adapted:
        """Copy the adapters on the same shared network, for averaging."""
        copied = Adapted(self.base, self.spec)
        copied.layers = copy.deepcopy(self.layers, memo)
        return copied.requires_grad_(next(self.parameters()).requires_grad).train(self.training)


def merged(adapted: Adapted) -> dict[str, Tensor]:
    """Merge the adapters into the shared denoiser's state, in float32; the writer rounds it once.

    Raises:
        SettingsError: the shared weights are already rounded or quantised, so most of a small adapter would be lost.
    """
    state = dict(adapted.base.state_dict())
    if is_quantized(adapted.base):
        raise SettingsError(
            "adapters must be merged into float32 weights, got quantised ones. Try: load the teacher with quantize null"
        )
    for name, adapter in adapted.adapters().items():
        weight = state[f"{name}.weight"]
        if weight.dtype != torch.float32:
            raise SettingsError(
                f"adapters must be merged into float32 weights, {name} is {str(weight.dtype).removeprefix('torch.')}. "
                "Try: load the teacher with dtype float32"
            )
        state[f"{name}.weight"] = weight + adapter.product().detach()
    return state


def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for `torch.utils.checkpoint`: recomputing a block uses the adapter of its first forward."""
    return nullcontext(), _active(_ACTIVE.get())


@contextmanager
def _active(adapted: Adapted | None) -> Iterator[None]:
    token = _ACTIVE.set(adapted)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _listen(layer: nn.Module, key: str) -> None:
    """Hook a layer once, however many adapters it has."""
    if any(isinstance(hook, _Hook) for hook in layer._forward_hooks.values()):
        return
    layer.register_forward_hook(_Hook(key))


class _Hook:
    """Adds the active adapter's term to a layer's output."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        active = _ACTIVE.get()
        if active is None or self.key not in active.layers:
            return output
        return output + active.layers[self.key](inputs[0], layer).to(output.dtype)
