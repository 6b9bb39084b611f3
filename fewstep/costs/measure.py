"""Measure the cost of updates by running them: operations on any device, on the meta device also bytes and messages.

The cost of an iteration is the mean over a cycle: `critic_steps` iterations, and rollouts of every number of steps. Iterations
of one, two and all K steps are run; between two and K each step adds one call, which gives the mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fewstep.costs.counting import Counter, Memory, Peak
from fewstep.costs.meta import as_on_a_gpu
from fewstep.costs.outline import Outline
from fewstep.diffusion import denoiser
from fewstep.diffusion.noise import double_device
from fewstep.methods.base import Critic
from fewstep.networks.blocks import blocks_of
from fewstep.system.errors import SettingsError
from fewstep.training.distill import Distillation
from fewstep.training.optim import Stepper
from fewstep.training.player import Player, shared_network
from fewstep.training.task import Micro

__all__ = ["Update", "Work", "count", "measure", "middle"]

Key = TypeVar("Key")


@dataclass(frozen=True)
class Work:
    """Operations (multiplications and additions) of one sample.

    Attributes:
        forward: operations of one forward of the teacher's network, or of the student's if the teacher is analytic: 1 F.
        iteration: operations of one iteration.
    """

    forward: float
    iteration: float

    @property
    def passes(self) -> float:
        """Cost of an iteration in forwards, F."""
        return self.iteration / self.forward


@dataclass
class Update:
    """Costs of one update, measured on the meta device.

    Attributes:
        work: operations per sample.
        peaks: player -> peak bytes of its part of an iteration.
        gathered: network -> values gathered in an iteration with one micro-batch, if it is split.
        scattered: player -> gradient values reduced in such an iteration.
        swapped: bytes of blocks that come from the host in such an iteration.
    """

    work: Work
    peaks: dict[str, Peak] = field(default_factory=dict)
    gathered: dict[nn.Module, float] = field(default_factory=dict)
    scattered: dict[str, float] = field(default_factory=dict)
    swapped: float = 0.0


def count(
    task: Distillation,
    size: int,
    memory: Memory | None = None,
    each: Callable[[float], None] = lambda share: None,
    kernels: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Work:
    """Run the iterations of a cycle and count their operations.

    Args:
        task: the task to update; on other devices than meta this trains its networks.
        size: samples per forward; one micro-batch is run.
        memory: records every tensor that the updates make.
        each: called after each update with its share of all iterations.
        kernels: context of the updates.
    """
    total = 0.0
    for share, images in _cycle(task):
        with kernels(), Counter(memory) as counter:
            task.update(images, [Micro(images, size, task.train.seed)])
        total += share * counter.operations
        each(share)
    return Work(_forward(task, size), total / size)


def middle(task: Distillation) -> int:
    """Return an iteration in the middle of the run, with a generator update: terms that begin later have begun there."""
    period = task.objective.critic_steps
    return task.train.images // task.train.batch_size // 2 // period * period


def _cycle(task: Distillation) -> Iterator[tuple[float, int]]:
    """Representative iterations: share of all iterations, and images seen before."""
    calls, objective = task.nets.generator.steps, task.objective
    last = {} if calls < 3 else dict.fromkeys((2, calls), (calls - 1) / (2 * calls))
    shares = dict.fromkeys(range(1, min(calls, 2) + 1), 1 / calls) | last
    period = objective.critic_steps if objective.needs_critic else 1
    for steps, share in shares.items():
        for both in (True, False)[: min(period, 2)]:
            places = itertools.count(middle(task) + (0 if both else 1), period if both else 1)
            images = next(
                place * task.train.batch_size
                for place in places
                if (place % period == 0) is both and task.steps(place * task.train.batch_size) == steps
            )
            yield share * (1 / period if both else 1 - 1 / period), images


def _forward(task: Distillation, size: int) -> float:
    """Operations of one forward of one sample."""
    network = task.teacher.denoiser
    if not any(True for _ in network.parameters()):
        network = task.nets.generator.denoiser
    x = torch.zeros(size, *task.teacher.shape, device=task.device)
    t = torch.full((size,), 0.5, dtype=torch.float64, device=double_device(task.device))
    cond = task.teacher.conditioner.draw(size, task.device)
    with torch.no_grad(), Counter() as counter:
        network(x, t, **cond)
    return counter.operations / size


def measure(planned: Outline, size: int, split: bool = False) -> Update:
    """Run a cycle on the meta device.

    Args:
        planned: the run.
        size: samples per forward.
        split: run networks as when they are split over processes: to their ends (see `feature_of`).

    Raises:
        SettingsError: the method needs values, which meta tensors lack. Reading a single value gives 1, and a mask selects
            everything.
    """
    task = planned.task
    networks: list[nn.Module] = list(
        dict.fromkeys(shared_network(module) for module in (task.nets.teacher, *_modules(task)))
    )
    known = [
        value
        for module in (*networks, *_modules(task))
        for value in (*module.parameters(), *module.buffers())
    ]  # fmt: skip
    memory = Memory(known)
    found = Update(Work(1, 1))
    gathered, scattered = dict.fromkeys(networks, 0), dict.fromkeys((player.name for player in task.players), 0)

    def each(share: float) -> None:
        _add(found.gathered, gathered, share)
        _add(found.scattered, scattered, share)
        if task.swap is not None:
            found.swapped += share * task.swap.moved
            task.swap.moved = 0

    for player in task.players:
        player.stepper = _idle(player, memory, found.peaks)
        for parameter in player.module.parameters():
            parameter.register_post_accumulate_grad_hook(_arrival(player.name, memory, scattered))
    for network in networks:
        layers = [
            m.bottleneck for m in _modules(task) if isinstance(m, Critic) and m.head and shared_network(m) is network
        ]
        _watch_gathering(network, layers[0] if layers else "", gathered)
    whole = mock.patch.object(denoiser, "FSDPModule", nn.Module) if split else nullcontext()
    with torch.random.fork_rng(devices=[]), as_on_a_gpu(memory), whole:
        try:
            found.work = count(task, size, memory, each)
        except NotImplementedError as error:
            raise SettingsError(
                f"an update must run on tensors without values to be planned, got {type(task.objective).__name__}, where PyTorch says: "
                f"{str(error).splitlines()[0]}. Try: `fewstep bench`, which runs it on real ones"
            ) from error
    return found


def _add(totals: dict[Key, float], counts: dict[Key, int], share: float) -> None:
    """Add an iteration's counts to the mean, and reset them."""
    for key, number in counts.items():
        totals[key] = totals.get(key, 0.0) + share * number
        counts[key] = 0


def _modules(task: Distillation) -> list[nn.Module]:
    return [player.module for player in task.players]


def _idle(player: Player[Any], memory: Memory, peaks: dict[str, Peak]) -> Stepper:
    """Make an optimizer that changes no weights and records the peak before its step."""

    def step(images: int) -> Tensor:
        for parameter in player.module.parameters():
            parameter.grad = None
        peak = memory.take()
        before = peaks.get(player.name, Peak())
        alone = max(peak.alone, before.alone)
        largest = max(peak, before, key=lambda found: found.size)
        peaks[player.name] = Peak(largest.gradients, largest.copies, largest.rest, alone)
        return torch.zeros((), device="meta")

    idle = mock.Mock(spec=Stepper, step=step, parameters=[], host=None)
    return cast(Stepper, idle)


def _arrival(player: str, memory: Memory, scattered: dict[str, int]) -> Callable[[Tensor], None]:
    def arrived(parameter: Tensor) -> None:
        assert parameter.grad is not None
        memory.gradient(parameter.grad)
        scattered[player] += parameter.numel()

    return arrived


def _watch_gathering(network: nn.Module, read: str, gathered: dict[nn.Module, int]) -> None:
    """Count a block's weights at each forward and each backward; the rest only at forwards.

    Args:
        network: a network whose blocks `fewstep.networks.placement.shard` splits.
        read: path of the layer that a GAN head reads; a block around it belongs to the rest.
        gathered: network -> values.
    """
    layer = network.get_submodule(read) if read else None
    blocks = [b for b in blocks_of(network) if layer is None or layer is b or layer not in set(b.modules())]
    inside = {value for block in blocks for value in block.parameters()}
    rest = sum(value.numel() for value in network.parameters() if value not in inside)

    def gather(size: int) -> None:
        gathered[network] += size

    def begun(size: int) -> None:
        if torch._C._current_graph_task_id() == -1:  # a block recomputed in a backward pass is whole already
            gather(size)

    for block in blocks:
        size = sum(value.numel() for value in block.parameters())
        block.register_forward_pre_hook(lambda _, args, size=size: begun(size))
        block.register_forward_hook(lambda _, args, output, size=size: _at_backward(output, lambda: gather(size)))
    network.register_forward_pre_hook(lambda _, args: begun(rest))


def _at_backward(output: Any, call: Callable[[], None]) -> None:
    """Call once when the first gradient arrives at a block's outputs."""
    arrived = False

    def first(_: Tensor) -> None:
        nonlocal arrived
        if not arrived:
            arrived = True
            call()

    for value in tree_leaves(output):
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(first)
