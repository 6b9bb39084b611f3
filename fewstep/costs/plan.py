"""What a run will take, before anything is loaded: parameters, memory by part, work, messages, hours.

The network is built without storage (torch's meta device) and run once: its operations are counted by torch, and what
its backward pass would keep by autograd's own hooks. The rest is arithmetic (`fewstep.costs.machines`), and its assumptions are
printed. Knows no measured speed.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fewstep.costs.machines import (
    BUS,
    CARDS,
    EFFICIENCY,
    GPUS,
    HOST,
    REACHED,
    WRITING,
    Gpu,
    Messages,
    Offloading,
    Published,
    Step,
)
from fewstep.diffusion.denoiser import Preconditioned, feature_of
from fewstep.evaluation.perceptual import PerceptualName, perceptual_outline
from fewstep.methods import SiD
from fewstep.methods.base import ENCODER
from fewstep.methods.gan import ConvHead, TokenHead
from fewstep.networks.blocks import blocks_of
from fewstep.networks.lora import Adapted
from fewstep.networks.placement import KEPT
from fewstep.run.specs import DistillRun
from fewstep.system.console import quiet
from fewstep.system.errors import SettingsError
from fewstep.teachers import DiffusersTeacher, MixtureTeacher, NativeTeacher, TeacherSpec
from fewstep.training.optim import OptimSpec, check_offload

__all__ = ["Part", "Plan", "plan"]


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
        batch: samples an iteration, of all processes.
        processes: that share it.
        messages: of one process in an iteration.
        checkpoint: bytes of one.
        bf16: networks compute in bfloat16.
        exact: in float32, without TF32.
        offloading: what lies and works at the host (`train.offload`).
        building: bytes in the host's memory of each process while networks are split over processes, before training; 0 if they
            are not.
        pair: bytes of a teacher pair on disk, where they stay; 0 for methods without pairs.
    """

    parameters: dict[str, tuple[int, int]]
    parts: tuple[Part, ...]
    forward: float
    passes: float
    samples: int
    micro_batch: int
    batch: int
    processes: int
    messages: tuple[Messages, ...]
    checkpoint: int
    bf16: bool
    exact: bool
    offloading: Offloading
    building: int
    pair: int

    @property
    def memory(self) -> int:
        """Bytes at the peak, without what the driver takes."""
        return sum(part.size for part in self.parts)

    def fits(self, gpu: Gpu) -> bool:
        """Whether a process fits such a card, the driver's share included."""
        return self.memory + CONTEXT <= gpu.memory * 2**30

    def step(self, gpu: Gpu) -> Step:
        """An iteration, if each process has such a card."""
        operations = self.forward * self.passes * self.batch / self.processes
        return Step.on(gpu, operations, self.messages, self.bf16, self.offloading.seconds, self.exact)

    def hours(self, gpu: Gpu) -> float:
        """Hours of all cards together for the whole run."""
        return self.step(gpu).seconds * self.samples / self.batch * self.processes / 3600

    def beside(self, run: Published) -> str:
        """The published run that this one repeats, and what this plan says of it if it is for as many cards (A100)."""
        text = (
            f"published: {run.gpus} GPUs x {run.batch}, {run.iterations / 1000:g}k iterations in {run.hours:g} hours: {run.seconds:.2f} s an "
            f"iteration, {run.gpus * run.hours:,.0f} GPU hours"
        )
        if self.processes != run.gpus or self.batch != run.gpus * run.batch:
            return f"{text} (--processes {run.gpus} compares)"
        step = self.step(GPUS["A100"])
        reached = self.forward * self.passes * run.batch / run.seconds / GPUS["A100"].operations
        return (
            f"{text}; this plan says {step.seconds:.2f} s for as many A100 ({step.seconds / run.seconds - 1:+.0%}): that program reached "
            f"{reached:.0%} of their operations by this count"
        )

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
        if self.processes > 1:
            near, far = sum(part.near for part in self.messages), sum(part.far for part in self.messages)
            lines.append(
                f"messages of a process in an iteration: {near / gib:.2f} GiB within its machine, {far / gib:.2f} "
                f"GiB across ({CARDS} cards a machine)"
            )
        if self.offloading.memory:
            lines.append(
                f"at the host: {self.offloading.memory / gib:.2f} GiB of memory; {self.offloading.moved / gib:.2f} GiB over the bus and "
                f"{self.offloading.touched / gib:.2f} GiB of work there in an iteration, {self.offloading.seconds:.2f} s at {BUS / 1e9:g} and {HOST / 1e9:g} GB/s, "
                "in the times below"
            )
        if self.building:
            lines.append(
                f"at the host, while the networks are split: {self.building / gib:.2f} GiB of each process, "
                f"{self.building * min(self.processes, CARDS) / gib:,.0f} GiB a machine"
            )
        if self.pair:
            lines.append(f"a pair: {self.pair / 2**20:.3f} MiB on disk, read when it is needed")
        each = "one card" if self.processes == 1 else f"each of {self.processes} cards"
        lines.append(f"on {each}: {self.batch / self.processes:g} sample(s) an iteration")
        for name, gpu in GPUS.items():
            fits = "fits" if self.fits(gpu) else "does not fit"
            step, hours = self.step(gpu), self.hours(gpu)
            lines.append(
                f"  {name:<10} {gpu.memory:>3} GiB  {fits:<13} {step.seconds:>8.2f} s an iteration (computing {step.computing:.2f}, messages "
                f"{step.messages:.2f}), {hours / self.processes:,.1f} hours, {hours:,.1f} GPU hours"
            )
        lines.append(
            f"a checkpoint: {self.checkpoint / gib:.2f} GiB, {self.checkpoint / WRITING:,.0f} s at {WRITING / 1e9:g} GB/s"
        )
        lines.append(
            f"assumed: {EFFICIENCY:.0%} of {', '.join(f'{g.rate(self.bf16, self.exact) / 1e12:.0f}' for g in GPUS.values())} TFLOP/s ({'bfloat16' if self.bf16 else 'float32' if self.exact else 'TF32'}); {REACHED:.0%} of "
            f"{', '.join(f'{g.near / 1e9:.0f}' for g in GPUS.values())} GB/s within a machine and of "
            f"{', '.join(f'{g.far / 1e9:.0f}' for g in GPUS.values())} GB/s between machines"
        )
        return "\n".join(lines)


def _outline(spec: TeacherSpec) -> tuple[Callable[[], Any], tuple[int, ...], str, dict[str, torch.Tensor]]:
    """What makes a student's network without storage, the shape of a sample, the GAN head's layer, one sample's condition.

    Teachers from outside the package are loaded for that: their files are theirs alone to read.
    """
    if isinstance(spec, DiffusersTeacher | NativeTeacher):
        outline, cond = spec.outline()
        return outline.build, tuple(outline.net.sample_shape), outline.net.bottleneck, cond
    teacher = spec.load()
    with torch.device("cpu"):
        cond = teacher.conditioner.cond(None, 1)
    return (
        lambda: teacher.start().to("meta"),
        teacher.shape,
        teacher.bottleneck,
        {name: value.to("meta") for name, value in cond.items()},
    )


def plan(run: DistillRun, processes: int | None = None) -> Plan:
    """Count a run's parameters, memory and work.

    Args:
        run: with a teacher that is a network.
        processes: that share the batch; each holds whole networks, or a shard of them (`train.mesh`). None: as few as the mesh
            needs.

    Raises:
        SettingsError: another kind of teacher, or a batch or mesh that the processes do not make.
        TeacherError: the network's configuration cannot be had.
        SettingsError: moments of 8 bits in the host's memory.
        EvaluationError: the method needs LPIPS, and its packages are not installed.
    """
    if processes is None:
        processes = run.train.mesh.shard * (run.train.mesh.replicate or 1)
    if isinstance(run.teacher, MixtureTeacher):
        raise SettingsError("plan is for teachers that are networks, got `teacher.kind: mixture`, which is a formula")
    mesh, batch = run.train.mesh, run.train.batch_size
    shard, micro = mesh.shard, run.train.micro_batch or max(1, batch // processes)
    if batch % (processes * micro):
        raise SettingsError(
            f"train.batch_size {batch} is not divisible by {processes} processes x micro-batches of {micro}: give another --processes"
        )
    if processes % shard or (mesh.replicate or processes // shard) * shard != processes:
        raise SettingsError(
            f"train.mesh.shard {shard}{f' x replicate {mesh.replicate}' if mesh.replicate else ''} does not divide {processes} processes: "
            "give --processes a multiple of it"
        )
    if shard > 1 and not mesh.teacher and run.generator.lora and run.critic.lora:
        raise SettingsError(
            "train.mesh.teacher false leaves nothing to split: student and fake score are adapters on the teacher"
        )
    offload = run.train.offload
    if offload:
        check_offload(run.optim.generator, run.optim.critic)
    if offload and processes > 1:
        raise SettingsError(
            "train.offload is for one process; with several cards, split the networks over them (train.mesh.shard)"
        )
    build, shape, bottleneck, cond = _outline(run.teacher)
    bf16 = run.train.precision in ("bf16", "auto")
    with torch.device("meta"):
        teacher = build().requires_grad_(False)
        generator = Adapted(teacher, run.generator.lora) if run.generator.lora else build()
        critic = Adapted(teacher, run.critic.lora) if run.critic.lora else build()
    frozen = getattr(torch, run.teacher.dtype) if isinstance(run.teacher, DiffusersTeacher) else torch.float32
    with quiet():
        teacher.to(frozen)
    measured = _Measured(shape, cond, micro, run.train.gradient_checkpointing, bf16, run.train.recompute_activations)
    forward = measured.operations(teacher, backward=False)
    alike = run.generator.lora == run.critic.lora  # then one is as good as the other
    worked = [measured.operations(module) for module in ((generator,) if alike else (generator, critic))]
    player = measured.kept(generator)
    fake = player if alike else measured.kept(critic)
    through = measured.kept(teacher, inputs=True) if isinstance(run.objective, SiD) else 0
    decoder = None
    if isinstance(run.teacher, DiffusersTeacher) and run.objective.needs_pairs:
        decoder = run.teacher.outline_decoder()
    regression = measured.regression(run.perceptual, decoder) if run.objective.needs_pairs else _Regression()
    gan = run.objective.needs_real
    head = measured.head(teacher, bottleneck) if gan else 0
    encoder = measured.encoder(teacher, bottleneck) / forward if gan else 0.0

    own = {module: 1 if isinstance(module, Adapted) else shard for module in (generator, critic)}  # adapters are whole
    held = _count(teacher) * frozen.itemsize // (shard if run.train.mesh.teacher else 1)
    parts = [Part(f"teacher, {str(frozen).removeprefix('torch.')}", held)]
    if regression.weights:
        parts.append(Part("perceptual distance" + (" and decoder" if decoder else ""), regression.weights))
    averaged = run.train.ema_half_life > 0 or offload  # without an average there is no copy
    state = _state("student", _count(generator), run.optim.generator, averaged)
    trained = {generator: _count(generator)}
    if run.objective.needs_critic:
        state += _state("fake score", _count(critic) + head, run.optim.critic, averaged=False)
        trained[critic] = _count(critic) + head
    checkpoint = sum(part.size for part in state)
    width = {module: 2 if offload and bf16 and not isinstance(module, Adapted) else 4 for module in trained}
    offloading, often = Offloading(), {generator: 1 / run.objective.critic_steps, critic: 1.0}
    if offload:
        offloading = Offloading(  # besides what a checkpoint holds, the gradients of a turn and what they arrive in
            memory=checkpoint + max((4 if width[module] == 4 else 6) * count for module, count in trained.items()),
            moved=sum(often[module] * count * 2 * width[module] for module, count in trained.items()),
            # of a weight: gradients widened and weights staged, gradients clipped (8), Adam's step (28), the average's (12)
            touched=sum(
                often[module]
                * count
                * ((12 if width[module] == 2 else 8) + 8 + 28 + (12 if module is generator else 0))
                for module, count in trained.items()
            ),
        )
        state = [
            Part(f"{name}: weights, {'bfloat16' if width[module] == 2 else 'float32'}", width[module] * trained[module])
            for name, module in (("student", generator), ("fake score", critic))
            if module in trained
        ]
    parts += [
        Part(part.name, part.size // own[critic if part.name.startswith("fake") else generator]) for part in state
    ]
    if shard > 1:
        parts.append(Part("blocks put together to compute with", _together(teacher, bf16)))
    # One player at a time has gradients. A GAN head's gradient runs through the encoder half of the fake score, which the
    # critic's turn does for fakes and real images besides (split networks run to their end first); SiD's runs through both
    # scores; pairs have a rollout of their own.
    judged = int((1.0 if shard > 1 else ENCODER) * fake) if gan else 0
    activations = player * _rollouts(run) + judged + regression.held
    if isinstance(run.objective, SiD):
        activations += through * run.objective.teacher_cost + fake * _batches(run.objective.fake_guidance)
    copies = bf16 and shard == 1 and not offload  # what is split travels in bfloat16, what is offloaded rests in it
    turns = [_turn("student", generator, width[generator] * _count(generator) // own[generator], activations, copies)]
    if run.objective.needs_critic:
        again = _batches(run.objective.critic_guidance) if isinstance(run.objective, SiD) else 1
        activations = fake * again + judged + (int(ENCODER * fake) if gan else 0)
        turns.append(_turn("fake score", critic, width[critic] * trained[critic] // own[critic], activations, copies))
    parts += max(turns, key=lambda turn: sum(part.size for part in turn))
    return Plan(
        parameters={
            "teacher": (_count(teacher), 0),
            "student": (_count(teacher), _count(generator)),
            "fake score": (_count(teacher) + head, (_count(critic) + head) if run.objective.needs_critic else 0),
        },
        parts=tuple(parts),
        forward=forward,
        passes=_passes(run, worked[0] / forward, worked[-1] / forward, encoder, regression.operations / forward),
        samples=run.train.images,
        micro_batch=micro,
        batch=batch,
        processes=processes,
        messages=_messages(
            run, teacher, generator, critic, trained, batch / processes / micro, processes, bf16, encoder
        ),
        checkpoint=checkpoint,
        bf16=bf16,
        exact=run.train.precision == "fp32",
        offloading=offloading,
        # averaged weights too; everything is float32 but the frozen teacher, which adapters share
        building=(
            _count(teacher) * frozen.itemsize
            + sum(4 * count * (2 if module is generator else 1) for module, count in trained.items())
            if shard > 1
            else 0
        ),
        pair=2 * 4 * math.prod(shape) if run.objective.needs_pairs else 0,
    )


def _messages(
    run: DistillRun, teacher: nn.Module, generator: nn.Module, critic: nn.Module, trained: dict[nn.Module, int],
    forwards: float, processes: int, bf16: bool, encoder: float,
) -> tuple[Messages, ...]:  # fmt: skip
    """What a process sends in an iteration.

    Args:
        run: the run.
        teacher: of the three networks.
        generator: the student, whole or adapters on the teacher.
        critic: likewise.
        trained: numbers with gradients, by network.
        forwards: micro-batches in an iteration.
        processes: that share the batch.
        bf16: weights travel as bfloat16.
        encoder: share of the network below a GAN head, in whose backward pass alone weights are put together.
    """
    objective, mesh = run.objective, run.train.mesh
    turns = 1 / objective.critic_steps
    turn = {generator: turns * _rollouts(run), critic: 1.0}  # backward passes
    whole = [module for module in trained if mesh.shard == 1 or isinstance(module, Adapted)]
    averaged = Messages.averaging(
        4 * sum((turns if module is generator else 1.0) * trained[module] for module in whole), processes
    )
    if mesh.shard == 1:
        return (averaged,)
    # How often each network is put together: in every forward, and again in every backward.
    parts = objective.passes(_calls(run))
    through = (2 if isinstance(objective, SiD) else 1) if any(name.startswith("scores") for name in parts) else 0
    judged = (_judgements(run) + turns) * (1 + encoder) if objective.needs_real else 0  # the head's own forwards
    calls = {
        generator: parts["rollouts"] + turns + 2 * turns * (_rollouts(run) - 1),
        critic: through * turns + 2 + judged if critic in trained else 0,
        teacher: through * turns,
    }
    split = {module for module in calls if mesh.teacher or not (module is teacher or isinstance(module, Adapted))}
    gathered = sum(calls[module] for module in split) * (2 if bf16 else 4) * _count(teacher)
    scattered = 4 * sum(turn[module] * count for module, count in trained.items() if not isinstance(module, Adapted))
    replicate = processes // mesh.shard
    return averaged, Messages.splitting(forwards * gathered, forwards * scattered, mesh.shard, replicate)


def _judgements(run: DistillRun) -> int:
    """Forwards of the critic's turn that are for the GAN head alone: real images, and fakes unless it reads the denoising forward."""
    return 1 if getattr(run.objective, "share_forward", False) else 2


def _rollouts(run: DistillRun) -> int:
    """That a generator's update goes back through: pairs have one of their own, unless it is the only one."""
    return 2 if run.objective.needs_pairs and not run.objective.rolls_out_pairs else 1


def _batches(guidance: float | None) -> int:
    """Batches that a guided network runs at once."""
    return 1 if guidance in (None, 1) else 2


def _calls(run: DistillRun) -> int:
    """K, the student's steps."""
    return len(run.generator.timesteps or run.generator.times or run.generator.sigmas or ())


def _passes(run: DistillRun, player: float, fake: float, encoder: float, regression: float) -> float:
    """F of a sample in an iteration: the objective's count, with backward passes as they were counted.

    Args:
        run: the run.
        player: operations of the student's forward and backward in F (3 for a whole network, less for adapters).
        fake: the same of the fake score.
        encoder: operations of a forward that ends where a GAN head reads, in F.
        regression: operations of the perceptual distance of a pair, in F.
    """
    parts, turns = run.objective.passes(_calls(run)), 1 / run.objective.critic_steps
    again = 1.0 if run.train.gradient_checkpointing else 0.0  # each backward pass computes its forward once more
    parts["generator backward"] = (player - 1 + again) * turns
    if "regression" in parts:
        parts["regression"] += (player - 3 + again) * turns
    if "scores with input gradients" in parts:
        parts["scores with input gradients"] *= 1 + again / 2
    if run.objective.needs_real:
        forward = (
            1.0 if run.train.mesh.shard > 1 else encoder
        )  # a split network runs to its end, its backward begins at the head
        parts["generator GAN"] = (forward + (1 + again) * encoder) * turns
        parts["critic GAN"] = (forward + (fake - 1 + again) * encoder) * _judgements(run)
    if "fake score" in parts:
        parts["fake score"] += (fake - 3 + again) * parts["fake score"] / 3
    parts["perceptual distance"] = regression * turns
    return sum(parts.values())


def _state(name: str, count: int, optim: OptimSpec, averaged: bool) -> list[Part]:
    """What a trained network takes all the time."""
    moments = (8 if optim.first_moment else 4) * count
    if optim.kind == "adamw8bit":
        moments = 2 * (count + count // 64)  # a scale for 256 codes
    parts = [Part(f"{name}: weights, float32", 4 * count), Part(f"{name}: Adam's moments", moments)]
    return [*parts, Part(f"{name}: averaged weights", 4 * count)] if averaged else parts


def _together(module: nn.Module, bf16: bool) -> int:
    """Bytes of a split network that are whole at a time: what lies outside of blocks, the largest block, and the next one."""
    sizes = sorted(_count(block) for block in blocks_of(module))
    outside = _count(module) - sum(sizes)
    return (outside + sum(sizes[-2:])) * (2 if bf16 else 4)


def _turn(name: str, module: nn.Module, gradients: int, activations: int, copies: bool) -> list[Part]:
    """What a player's update takes for its duration."""
    parts = [Part(f"{name}'s turn: gradients", gradients), Part(f"{name}'s turn: activations", activations)]
    if copies and not isinstance(module, Adapted):
        parts.append(Part(f"{name}'s turn: bf16 copies of the weights", gradients // 2))
    return parts


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class _Regression:
    """Perceptual distance of pairs: bytes of its frozen networks, most bytes that a micro-batch's forward and backward pass hold,
    and operations of one pair, forward and backward."""

    weights: int = 0
    held: int = 0
    operations: float = 0.0


class _Measured:
    """Forwards on the meta device: operations, and bytes that a backward pass would need.

    Args:
        shape: of a sample.
        cond: the condition of one sample by name, without storage.
        micro: samples.
        recompute: only the inputs of blocks are kept, and the inside of the largest at a time.
        bf16: activations have two bytes instead of four.
        between: the results of dear operations in blocks are kept as well as their inputs.
    """

    def __init__(
        self,
        shape: Sequence[int],
        cond: dict[str, Tensor],
        micro: int,
        recompute: bool,
        bf16: bool,
        between: bool = False,
    ) -> None:
        self.shape, self.cond, self.micro, self.bf16 = tuple(shape), cond, micro, bf16
        self.recompute, self.between = recompute or between, between

    def operations(self, denoiser: nn.Module, backward: bool = True) -> float:
        """Of one forward of one sample, and of its backward pass to what is trained."""
        with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
            output = self._forward(denoiser, 1)
            if backward:
                output.sum().backward()
        denoiser.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    def encoder(self, denoiser: Preconditioned, bottleneck: str) -> float:
        """Operations of a forward of one sample that ends at the bottleneck."""
        x, t, cond = self._inputs(1)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            feature_of(denoiser.net, bottleneck, x, t, **cond)
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
        kept, largest = _Kept(denoiser), 0

        def block(forward: Any, *args: Any, **options: Any) -> Any:
            nonlocal largest
            inner = _Kept(denoiser)
            for value in (*args, *options.values()):
                if isinstance(value, Tensor) and value.requires_grad:
                    kept.add(value)
            with inner.hooks(), _Dear(kept) if self.between else nullcontext():
                out = forward(*args, **options)
            largest = max(largest, inner.size - (inner.shared(kept) if self.between else 0))
            return out

        def attend(*args: Any, **options: Any) -> Tensor:
            out = _attention(*args, **options)
            if self.between:  # a dear operation, though not of a name that the meta device has
                kept.add(out)
            return out

        attention = mock.patch.object(F, "scaled_dot_product_attention", attend)
        with _blocks_through(block if self.recompute else None, shared.net), kept.hooks(), attention:
            self._forward(denoiser, self.micro, inputs)
        narrow = (
            self.bf16 and next(shared.parameters()).dtype == torch.float32
        )  # autocast's activations are half as wide as the weights
        return (kept.size + largest) // (2 if narrow else 1)

    def regression(self, name: PerceptualName, decoder: nn.Module | None) -> _Regression:
        """What a perceptual distance takes, of decoded samples if there is a decoder. All of it is in float32."""

        def decode(samples: Tensor) -> Tensor:
            return samples if decoder is None else decoder.decode(samples, return_dict=False)[0]

        def distances(count: int) -> Tensor:
            x, _, _ = self._inputs(count, gradient=True)
            with torch.no_grad():
                wanted = decode(torch.zeros_like(x))
            return distance(decode(x), wanted)

        with torch.no_grad():
            picture = decode(torch.zeros(1, *self.shape, device="meta"))
        net, distance = perceptual_outline(tuple(picture.shape[1:]), name)
        networks = nn.ModuleList([net] if decoder is None else [net, decoder])
        attention = mock.patch.object(F, "scaled_dot_product_attention", _attention)
        with attention, _Live() as live:
            distances(self.micro).sum().backward()
        with FlopCounterMode(display=False) as counter:
            distances(1).sum().backward()
        weights = sum(value.nbytes for value in (*networks.parameters(), *networks.buffers()))
        return _Regression(weights, live.most, counter.get_total_flops())

    def _inputs(self, count: int, gradient: bool = False) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x = torch.zeros(count, *self.shape, device="meta", requires_grad=gradient)
        cond = {name: value.new_zeros(count, *value.shape[1:]) for name, value in self.cond.items()}
        return x, torch.zeros(count, device="meta"), cond

    def _forward(self, denoiser: nn.Module, count: int, inputs: bool = False) -> Tensor:
        x, t, cond = self._inputs(count, inputs)
        if not isinstance(denoiser, Adapted):
            return denoiser.net(x, t, **cond)
        with denoiser.running():
            return denoiser.base.net(x, t, **cond)


@contextmanager
def _blocks_through(block: Callable[..., Any] | None, net: nn.Module) -> Iterator[None]:
    """Run each of a network's blocks as `block(forward, *inputs)`, as gradient checkpointing does; None: as they are."""
    if block is None:
        yield
        return
    blocks = blocks_of(net)
    for part in blocks:
        part.forward = partial(block, part.forward)
    try:
        yield
    finally:
        for part in blocks:
            del part.forward


class _Fused(torch.autograd.Function):
    """What fused attention keeps: its inputs, its output and a number a row. The meta device would keep all scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(value) for value in ctx.saved_tensors[:3])


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    out: Tensor = _Fused.apply(query, key, value)
    return out


class _Live(TorchDispatchMode):
    """The most bytes that tensors made inside hold at a time, as an allocator would see it without the workspaces of kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self.seen:
                storage = value.untyped_storage()
                self.seen.add(storage._cdata)
                self.held += storage.nbytes()
                self.most = max(self.most, self.held)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return found

    def _gone(self, address: int, size: int) -> None:
        self.seen.discard(address)
        self.held -= size


class _Kept:
    """Distinct storages that autograd saves, the network's own weights left out."""

    def __init__(self, module: nn.Module) -> None:
        shared = module.base if isinstance(module, Adapted) else module
        self.weights = {p.untyped_storage()._cdata for p in (*module.parameters(), *shared.parameters())}
        self.seen: dict[int, Any] = {}

    @property
    def size(self) -> int:
        return sum(storage.nbytes() for storage in self.seen.values())

    def shared(self, other: _Kept) -> int:
        """Bytes that both have saved."""
        return sum(storage.nbytes() for address, storage in self.seen.items() if address in other.seen)

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


class _Dear(TorchDispatchMode):
    """Adds the results of dear operations to what is saved."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in KEPT:
            for value in tree_leaves(found):
                self.kept.add(value)
        return found
