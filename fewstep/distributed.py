"""The process group, if there is one: every function also works in a single process. Knows no model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "any_rank",
    "average_gradients",
    "barrier",
    "broadcast_weights",
    "gather",
    "gather_images",
    "mean",
    "process_group",
    "rank",
    "world_size",
]


BUCKET = 2**24  # numbers in a message


def rank() -> int:
    """This process's number, 0 if alone."""
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
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def broadcast_weights(modules: Iterable[nn.Module]) -> None:
    """Give every process rank 0's weights."""
    if world_size() > 1:
        for module in modules:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes, in messages of some 64 MiB: few, and no second copy of all."""
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    held = 0
    for parameter in parameters:
        if parameter.grad is not None:
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
    """A small picklable value of every process, in the order of their numbers."""
    if world_size() == 1:
        return [value]
    parts = [None] * world_size()
    dist.all_gather_object(parts, value)
    return parts


def mean(sums: dict[str, tuple[float, int]]) -> dict[str, float]:
    """Means over all processes of numbers given as name -> (sum, count); a process may lack a name."""
    parts = gather(sums)
    means = {}
    for name in sorted({name for part in parts for name in part}):
        found = [part[name] for part in parts if name in part]
        means[name] = sum(total for total, _ in found) / sum(count for _, count in found)
    return means


def barrier() -> None:
    """Wait for all processes: what one wrote, all can then read."""
    if world_size() > 1:
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on any process: a signal to one must stop all."""
    if world_size() == 1:
        return flag
    tensor = torch.tensor(float(flag))
    dist.all_reduce(tensor)
    return bool(tensor > 0)


def gather_images(images: Tensor) -> Tensor:
    """All processes' images [n, ...], interleaved as sample i came from process i mod world_size."""
    if world_size() == 1:
        return images
    parts = [torch.empty_like(images) for _ in range(world_size())]
    dist.all_gather(parts, images)
    return torch.stack(parts, dim=1).flatten(0, 1)
