"""What a text-to-image run will take, before anything is loaded: parameters, memory by part, work, hours.

The network is built without storage (torch's meta device) and run once: its operations are counted by torch, and what
its backward pass would keep by autograd's own hooks. The rest is arithmetic, and its assumptions are printed. Knows no
measured speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fewstep.denoiser import Preconditioned, feature_of
from fewstep.discriminator import ConvHead, TokenHead
from fewstep.lora import Adapted
from fewstep.nets.shard import units
from fewstep.objectives import SiD
from fewstep.objectives.base import ENCODER
from fewstep.optim import OptimSpec
from fewstep.run import DistillRun, RunError
from fewstep.teachers import DiffusersTeacher
from fewstep.tracking import quiet

__all__ = ["GPUS", "Gpu", "Part", "Plan", "plan"]


@dataclass(frozen=True)
class Gpu:
    """A card: memory in GiB, dense bf16 operations a second as its maker states them."""

    memory: int
    operations: float


GPUS = {
    "RTX 4090": Gpu(24, 165e12),
    "A100": Gpu(80, 312e12),
    "H100": Gpu(80, 989e12),
}
EFFICIENCY = 0.4  # share of the stated operations that a training of convolutions and attention reaches
CONTEXT = 2**30  # what the driver, the allocator's gaps and the libraries take on a card


@dataclass(frozen=True)
class Part:
    """A line of the memory table: bytes on each device."""

    name: str
    size: int


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        parameters: by network: (all, trained).
        parts: memory of one process; they add up to its peak.
        forward: operations of one forward of one sample, F.
        passes: F of one sample in one iteration.
        samples: of the whole run.
        micro_batch: samples a forward.
    """

    parameters: dict[str, tuple[int, int]]
    parts: tuple[Part, ...]
    forward: float
    passes: float
    samples: int
    micro_batch: int

    @property
    def memory(self) -> int:
        """Bytes at the peak, without what the driver takes."""
        return sum(part.size for part in self.parts)

    def hours(self, gpu: Gpu, efficiency: float = EFFICIENCY) -> float:
        """Hours of one card for the whole run."""
        return self.forward * self.passes * self.samples / (gpu.operations * efficiency) / 3600

    def __str__(self) -> str:
        gib = 2.0**30
        lines = ["parameters"]
        lines += [
            f"  {name:<12} {total:>14,} of them trained {trained:,}"
            for name, (total, trained) in self.parameters.items()
        ]
        lines += [f"memory of a process, {self.micro_batch} sample(s) a forward"]
        lines += [f"  {part.name:<44} {part.size / gib:>8.2f} GiB" for part in self.parts]
        lines += [
            f"  {'together':<44} {self.memory / gib:>8.2f} GiB, and about {CONTEXT / gib:.0f} GiB for driver and allocator"
        ]
        lines += [
            f"work: {self.forward / 1e12:.3f} TFLOP a forward (F), {self.passes:.1f} F a sample and iteration, "
            f"{self.samples:,} samples"
        ]
        for name, gpu in GPUS.items():
            fits = "fits" if self.memory + CONTEXT <= gpu.memory * gib else "does not fit"
            lines.append(f"  {name:<10} {gpu.memory:>3} GiB  {fits:<13} {self.hours(gpu):>10,.1f} GPU hours")
        lines.append(
            f"hours assume {EFFICIENCY:.0%} of {', '.join(f'{g.operations / 1e12:.0f}' for g in GPUS.values())} TFLOP/s"
        )
        return "\n".join(lines)


def plan(run: DistillRun, processes: int = 1) -> Plan:
    """Count a run's parameters, memory and work.

    Args:
        run: with a text-to-image teacher.
        processes: that share the batch; each holds whole networks, or a shard of them (`train.mesh`).

    Raises:
        RunError: another kind of teacher, or a mesh that the processes do not make.
        TeacherError: the network's configuration cannot be had.
    """
    if not isinstance(run.teacher, DiffusersTeacher):
        raise RunError("plan is for text-to-image teachers (kind: diffusers); `fewstep bench` measures small ones")
    shard = run.train.mesh.shard
    if processes % shard:
        raise RunError(
            f"train.mesh.shard {shard} does not divide {processes} processes: give --processes a multiple of it"
        )
    spec, cond = run.teacher.outline()
    bf16 = run.train.precision in ("bf16", "auto")
    with torch.device("meta"):
        teacher = spec.build().requires_grad_(False)
        generator = Adapted(teacher, run.generator.lora) if run.generator.lora else spec.build()
        critic = Adapted(teacher, run.critic.lora) if run.critic.lora else spec.build()
    frozen_dtype = getattr(torch, run.teacher.dtype)
    with quiet():
        teacher.net.model.to(frozen_dtype)
    micro = run.train.micro_batch or max(1, run.train.batch_size // processes)
    measured = _Measured(spec.net.sample_shape, cond, micro, run.train.gradient_checkpointing, bf16)
    forward = measured.operations(teacher, backward=False)
    alike = run.generator.lora == run.critic.lora  # then one is as good as the other
    worked = [measured.operations(module) for module in ((generator,) if alike else (generator, critic))]
    player = measured.kept(generator)
    fake = player if alike else measured.kept(critic)
    through = measured.kept(teacher, inputs=True) if isinstance(run.objective, SiD) else 0
    gan = run.objective.needs_real
    head = measured.head(teacher, spec.net.bottleneck) if gan else 0

    own = {module: 1 if isinstance(module, Adapted) else shard for module in (generator, critic)}  # adapters are whole
    held = _bytes(teacher, teacher.net.model.dtype) // (shard if run.train.mesh.teacher else 1)
    parts = [Part(f"teacher, {run.teacher.dtype}", held)]
    parts += _state("student", _count(generator) // own[generator], run.optim.generator, averaged=True)
    if run.objective.needs_critic:
        parts += _state("fake score", (_count(critic) + head) // own[critic], run.optim.critic, averaged=False)
    if shard > 1:
        parts.append(Part("blocks put together to compute with", _together(teacher, bf16)))
    # One player at a time has gradients. A GAN head's gradient runs through the encoder half of the fake score, which the
    # critic's turn does for fakes and real images besides; SiD's runs through both scores.
    activations = (
        player + (int(ENCODER * fake) if gan else 0) + (through + fake if isinstance(run.objective, SiD) else 0)
    )
    copies = bf16 and shard == 1  # what is split travels in bfloat16
    turns = [_turn("student", generator, _count(generator) // own[generator], activations, copies)]
    if run.objective.needs_critic:
        activations = fake + (int(2 * ENCODER * fake) if gan else 0)
        turns.append(_turn("fake score", critic, (_count(critic) + head) // own[critic], activations, copies))
    parts += max(turns, key=lambda turn: sum(part.size for part in turn))
    return Plan(
        parameters={
            "teacher": (_count(teacher), 0),
            "student": (_count(teacher), _count(generator)),
            "fake score": (_count(teacher) + head, (_count(critic) + head) if run.objective.needs_critic else 0),
        },
        parts=tuple(parts),
        forward=forward,
        passes=_passes(run, worked[0] / forward, worked[-1] / forward),
        samples=run.train.images,
        micro_batch=micro,
    )


def _passes(run: DistillRun, player: float, fake: float) -> float:
    """F of a sample in an iteration: the objective's count, with backward passes as they were counted.

    Args:
        run: the run.
        player: operations of the student's forward and backward in F (3 for a whole network, less for adapters).
        fake: the same of the fake score.
    """
    steps = len(run.generator.timesteps or run.generator.times or run.generator.sigmas or ())
    parts, turns = run.objective.passes(steps), 1 / run.objective.critic_steps
    again = 1.0 if run.train.gradient_checkpointing else 0.0  # each backward pass computes its forward once more
    parts["generator backward"] = (player - 1 + again) * turns
    if "fake score" in parts:
        parts["fake score"] += fake - 3 + again
    return sum(parts.values())


def _state(name: str, count: int, optim: OptimSpec, averaged: bool) -> list[Part]:
    """What a trained network takes all the time."""
    moments = 2 * (count + count // 64) if optim.kind == "adamw8bit" else 8 * count  # a scale for 256 codes
    parts = [Part(f"{name}: weights, float32", 4 * count), Part(f"{name}: Adam's moments", moments)]
    return [*parts, Part(f"{name}: averaged weights", 4 * count)] if averaged else parts


def _together(module: nn.Module, bf16: bool) -> int:
    """Bytes of a split network that are whole at a time: what lies outside of blocks, the largest block, and the next one."""
    blocks = units(module)
    inner = {block: {p for part in units(block) for p in part.parameters()} for block in blocks}
    sizes = sorted(sum(p.numel() for p in block.parameters() if p not in inner[block]) for block in blocks)
    outside = _count(module) - sum(sizes)
    return (outside + sum(sizes[-2:])) * (2 if bf16 else 4)


def _turn(name: str, module: nn.Module, count: int, activations: int, copies: bool) -> list[Part]:
    """What a player's update takes for its duration."""
    parts = [Part(f"{name}'s turn: gradients", 4 * count), Part(f"{name}'s turn: activations", activations)]
    if copies and not isinstance(module, Adapted):
        parts.append(Part(f"{name}'s turn: bf16 copies of the weights", 2 * count))
    return parts


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return _count(module) * dtype.itemsize


class _Measured:
    """Forwards on the meta device: operations, and bytes that a backward pass would need.

    Args:
        shape: of a sample.
        cond: shapes of the condition of one sample, by name.
        micro: samples.
        recompute: only the inputs of blocks are kept, and the inside of the largest at a time.
        bf16: activations have two bytes instead of four.
    """

    def __init__(
        self, shape: Sequence[int], cond: dict[str, tuple[int, ...]], micro: int, recompute: bool, bf16: bool
    ) -> None:
        self.shape, self.cond, self.micro, self.recompute, self.bf16 = tuple(shape), cond, micro, recompute, bf16

    def operations(self, denoiser: nn.Module, backward: bool = True) -> float:
        """Of one forward of one sample, and of its backward pass to what is trained."""
        with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
            output = self._forward(denoiser, 1)
            if backward:
                output.sum().backward()
        denoiser.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    def head(self, denoiser: Preconditioned, bottleneck: str) -> int:
        """Weights of the GAN head that `make_head` would make for the bottleneck's feature map."""
        x, t, cond = self._inputs(1)
        feature = feature_of(denoiser.net, bottleneck, x, t, **cond)
        with torch.device("meta"):
            if feature.ndim == 4:
                return _count(ConvHead(feature.shape[1], min(feature.shape[2:])))
            return _count(TokenHead(feature.shape[-1]))

    def kept(self, denoiser: nn.Module, inputs: bool = False) -> int:
        """Bytes kept for the backward pass of one forward of a micro-batch; `inputs`: to the sample, weights frozen."""
        shared = denoiser.base if isinstance(denoiser, Adapted) else denoiser
        model = shared.net.model
        kept, largest = _Kept(denoiser), 0

        def block(forward: Any, *args: Any) -> Any:
            nonlocal largest
            inner = _Kept(denoiser)
            for value in args:
                if isinstance(value, Tensor) and value.requires_grad:
                    kept.add(value)
            with inner.hooks():
                out = forward(*args)
            largest = max(largest, inner.size)
            return out

        if self.recompute:
            model.enable_gradient_checkpointing(block)
            model.train()
        try:
            with kept.hooks(), mock.patch.object(F, "scaled_dot_product_attention", _attention):
                self._forward(denoiser, self.micro, inputs)
        finally:
            model.disable_gradient_checkpointing()
        narrow = self.bf16 and model.dtype == torch.float32  # autocast's activations are half as wide as the weights
        return (kept.size + largest) // (2 if narrow else 1)

    def _inputs(self, count: int, gradient: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x = torch.zeros(count, *self.shape, device="meta", requires_grad=gradient)
        cond = {name: torch.zeros(count, *shape, device="meta") for name, shape in self.cond.items()}
        return x, torch.zeros(count, device="meta"), cond

    def _forward(self, denoiser: nn.Module, count: int, inputs: bool = False) -> Tensor:
        x, t, cond = self._inputs(count, inputs)
        if not isinstance(denoiser, Adapted):
            return denoiser.net(x, t, **cond)
        with denoiser.running():
            return denoiser.base.net(x, t, **cond)


class _Fused(torch.autograd.Function):
    """What fused attention keeps: its inputs, its output and a number a row. The meta device would keep all scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    out: Tensor = _Fused.apply(query, key, value)
    return out


class _Kept:
    """Distinct storages that autograd saves, the network's own weights left out."""

    def __init__(self, module: nn.Module) -> None:
        shared = module.base if isinstance(module, Adapted) else module
        self.weights = {p.untyped_storage()._cdata for p in (*module.parameters(), *shared.parameters())}
        self.seen: dict[int, Any] = {}

    @property
    def size(self) -> int:
        return sum(storage.nbytes() for storage in self.seen.values())

    def add(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        if storage._cdata not in self.weights:
            self.seen[storage._cdata] = storage  # held, so that its address is not another's

    @contextmanager
    def hooks(self) -> Iterator[None]:
        def pack(value: Tensor) -> Tensor:
            self.add(value)
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            yield
