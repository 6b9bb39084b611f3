"""The process group, if any: every function also works in a single process. Knows no model.

Networks are either whole on every process, or split into shards (`MeshSpec`, `fewstep.networks.placement`). The parameters of
split networks are DTensors, whose gradients FSDP averages.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from fewstep.system.errors import SettingsError
from fewstep.system.record import Record

__all__ = [
    "MeshSpec",
    "any_rank",
    "average_gradients",
    "barrier",
    "fill",
    "gather",
    "gather_images",
    "mean",
    "nonfinite",
    "process_group",
    "rank",
    "shards",
    "whole",
    "world_size",
]


BUCKET = 2**24  # values per message


class MeshSpec(Record):
    """Arrangement of processes: `replicate` groups of `shard` processes each."""

    shard: int = Field(1, gt=0)
    """Processes that share one copy of every network (weights, averages, gradients, optimizer states) with PyTorch's FSDP2; 1:
    each process holds whole networks."""
    replicate: int | None = Field(None, gt=0)
    """Number of such copies; null: as many as the processes allow."""
    teacher: bool = True
    """Split the frozen teacher too; otherwise each process holds it whole, which saves its messages."""

    @property
    def splits(self) -> bool:
        """True if networks are split over processes."""
        return self.shard > 1

    def build(self, device: torch.device) -> DeviceMesh | None:
        """Build the mesh; None if networks are whole.

        Raises:
            SettingsError: it does not fit the number of processes.
        """
        replicate = self.replicate or max(1, world_size() // self.shard)
        if replicate * self.shard != world_size() and (self.shard > 1 or self.replicate):
            raise SettingsError(
                f"`train.mesh` of {replicate} x {self.shard} (replicate x shard) must have {replicate * self.shard} processes, got "
                f"{world_size()}. Try: start that many, or change the mesh"
            )
        if self.shard == 1:
            return None
        mesh = init_device_mesh(device.type, (replicate, self.shard), mesh_dim_names=("replicate", "shard"))
        return mesh if replicate > 1 else mesh["shard"]


def whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather the shards of a state dict on the CPU of rank 0; the other ranks get only whole tensors.

    Every process must call it if anything is split.
    """
    found = {}
    for name, value in state.items():
        if isinstance(value, DTensor):
            full = value.full_tensor()
            if rank() == 0:
                found[name] = full.cpu()
        else:
            found[name] = value
    return found


def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors like `load_state_dict`; a split module takes its own part.

    Raises:
        RuntimeError: as `load_state_dict`.
    """
    own = module.state_dict()

    def part(name: str, value: Tensor) -> Tensor:
        like = own.get(name)
        if not isinstance(like, DTensor) or like.shape != value.shape:
            return value  # another shape: load_state_dict reports it
        there = value.to(like.device, like.dtype)
        return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)

    module.load_state_dict({name: part(name, value) for name, value in state.items()})


def shards(module: nn.Module) -> list[Tensor]:
    """Parameters of a module at rest: for a split module this process's shards, also after a forward without backward."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return list(module.parameters())


def nonfinite(module: nn.Module) -> str | None:
    """Name of a parameter that holds NaN or infinity on any process; None if all are finite."""
    names, values = zip(*module.named_parameters(), strict=True) if any(True for _ in module.parameters()) else ((), ())
    local = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    bad, filled = None, [value for value in local if value.numel()]  # some processes hold no shard of a small parameter
    if filled and not torch.isfinite(torch.stack(torch._foreach_norm(filled, math.inf))).all():
        bad = next(name for name, value in zip(names, local, strict=True) if not torch.isfinite(value).all())
    return next((name for name in gather(bad) if name is not None), None)


def rank() -> int:
    """Rank of this process, 0 if alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 if alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group() -> Iterator[None]:
    """Join the group that torchrun announces in the environment; without torchrun, do nothing."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():  # before anything initialises the first GPU: sharding uses the current one
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, in messages of some 64 MiB, to avoid a copy of all gradients.

    Gradients of split parameters are skipped: FSDP has averaged them.
    """
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    held = 0
    for parameter in parameters:
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            bucket.append(parameter.grad)
            held += parameter.grad.numel()
            if held >= BUCKET:
                _average(bucket)
                bucket, held = [], 0
    if bucket:
        _average(bucket)


def _average(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def gather(value: Any) -> list[Any]:
    """Gather a small picklable value of every process, in the order of ranks."""
    if world_size() == 1:
        return [value]
    parts = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


def mean(sums: dict[str, tuple[float, int]]) -> dict[str, float]:
    """Means over all processes of numbers given as name -> (sum, count); names may be missing; a count of 0 has no mean."""
    parts = gather(sums)
    means = {}
    for name in sorted({name for part in parts for name in part}):
        found = [part[name] for part in parts if name in part]
        if count := sum(count for _, count in found):
            means[name] = sum(total for total, _ in found) / count
    return means


def barrier() -> None:
    """Wait for all processes, so that all can read what one wrote."""
    if world_size() > 1:
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is true on any process: a signal to one must stop all."""
    if world_size() == 1:
        return flag
    tensor = torch.tensor(float(flag))
    dist.all_reduce(tensor)
    return bool(tensor > 0)


def gather_images(images: Tensor) -> Tensor:
    """Gather all processes' images [n, ...], interleaved: sample i is from process i mod world_size."""
    if world_size() == 1:
        return images
    parts = [torch.empty_like(images) for _ in range(world_size())]
    dist.all_gather(parts, images)
    return torch.stack(parts, dim=1).flatten(0, 1)
