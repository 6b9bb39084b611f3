"""Predict the cost of a run without loading anything: parameters, memory by part, operations, messages, hours.

Operations, activations and messages are measured by an update without storage (`fewstep.costs.measure`), so nothing here
depends on the method. The rest is arithmetic (`fewstep.costs.machines`); its assumptions are printed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fewstep.costs.machines import (
    BUS,
    EFFICIENCY,
    GPUS,
    HOST,
    PER_MACHINE,
    REACHED,
    WRITING,
    Gpu,
    Messages,
    Offloading,
    Published,
    Step,
)
from fewstep.costs.measure import Update, Work, measure
from fewstep.costs.outline import Outline, outline
from fewstep.diffusion.denoiser import Denoiser
from fewstep.networks.blocks import blocks_of
from fewstep.networks.lora import Adapted
from fewstep.networks.quantized import parameter_count
from fewstep.run.frozen import check_frozen
from fewstep.run.specs import DistillRun
from fewstep.system.errors import SettingsError
from fewstep.training.optim import OptimSpec, check_offload
from fewstep.training.player import Player, shared_network

__all__ = ["CONTEXT", "Part", "Plan", "plan"]


CONTEXT = 2**30  # bytes of driver, allocator fragmentation and libraries on a GPU


@dataclass(frozen=True)
class Part:
    """A line of the memory table: bytes per device."""

    name: str
    size: int


@dataclass(frozen=True)
class Plan:
    """Prediction of `plan` for one run.

    Attributes:
        parameters: network -> (all, trained).
        parts: memory of one process; the parts add up to its peak.
        work: operations per sample.
        samples: samples of the whole run.
        micro_batch: samples per forward.
        batch: samples per iteration, over all processes.
        processes: number of processes.
        messages: messages of one process in an iteration.
        checkpoint: bytes of a checkpoint.
        bf16: whether networks compute in bfloat16.
        exact: whether they compute in float32 without TF32.
        offloading: memory and work on the host (`train.offload`).
        building: bytes of host memory per process while networks are being split, before training; 0 if they are not.
        pair: bytes of a teacher pair on disk; 0 for methods without pairs.
    """

    parameters: dict[str, tuple[int, int]]
    parts: tuple[Part, ...]
    work: Work
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
        """Peak bytes, without the driver's."""
        return sum(part.size for part in self.parts)

    def fits(self, gpu: Gpu) -> bool:
        """Return whether a process fits such a GPU, including the driver's share."""
        return self.memory + CONTEXT <= gpu.memory * 2**30

    def step(self, gpu: Gpu) -> Step:
        """Predict an iteration with one such GPU per process."""
        operations = self.work.iteration * self.batch / self.processes
        at_host = self.offloading
        return Step.on(gpu, operations, self.messages, self.bf16, at_host.seconds, self.exact, at_host.overlapped)

    def hours(self, gpu: Gpu) -> float:
        """GPU hours of the whole run."""
        return self.step(gpu).seconds * self.samples / self.batch * self.processes / 3600

    def compared(self, run: Published) -> str:
        """Describe the published run that this one reproduces, compared with the plan if it is for as many A100."""
        text = (
            f"published: {run.gpus} GPUs x {run.batch}, {run.iterations / 1000:g}k iterations in {run.hours:g} hours: {run.seconds:.2f} s an "
            f"iteration, {run.gpus * run.hours:,.0f} GPU hours"
        )
        if self.processes != run.gpus or self.batch != run.gpus * run.batch:
            return f"{text} (--processes {run.gpus} compares)"
        step = self.step(GPUS["A100"])
        reached = self.work.iteration * run.batch / run.seconds / GPUS["A100"].operations
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
            f"work: {self.work.forward / 1e12:.3f} TFLOP a forward (F), {self.work.passes:.1f} F a sample and iteration, "
            f"{self.samples:,} samples"
        ]
        if self.processes > 1:
            near, far = sum(part.near for part in self.messages), sum(part.far for part in self.messages)
            lines.append(
                f"messages of a process in an iteration: {near / gib:.2f} GiB within its machine, {far / gib:.2f} "
                f"GiB across ({PER_MACHINE} GPUs a machine)"
            )
        if self.offloading.memory:
            lines.append(
                f"at the host: {self.offloading.memory / gib:.2f} GiB of memory; {self.offloading.moved / gib:.2f} GiB over the bus and "
                f"{self.offloading.touched / gib:.2f} GiB of work there in an iteration, {self.offloading.seconds:.2f} s at {BUS / 1e9:g} and {HOST / 1e9:g} GB/s, "
                "in the times below"
            )
        if self.offloading.blocks:
            lines.append(
                f"blocks at the host: {self.offloading.blocks / gib:.2f} GiB of memory; {self.offloading.swapped / gib:.2f} GiB over the bus "
                f"in an iteration, {self.offloading.overlapped:.2f} s at {BUS / 1e9:g} GB/s while the network computes"
            )
        if self.building:
            lines.append(
                f"at the host, while the networks are split: {self.building / gib:.2f} GiB of each process, "
                f"{self.building * min(self.processes, PER_MACHINE) / gib:,.0f} GiB a machine"
            )
        if self.pair:
            lines.append(f"a pair: {self.pair / 2**20:.3f} MiB on disk, read when it is needed")
        each = "one GPU" if self.processes == 1 else f"each of {self.processes} GPUs"
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


def plan(run: DistillRun, processes: int | None = None) -> Plan:
    """Measure a run's update without storage, and compute its memory, messages and hours.

    Args:
        run: the run; its teacher is loaded only if its configuration is not enough.
        processes: number of processes that share the batch; each holds whole networks, or a shard of them (`train.mesh`).
            None: the smallest number for the mesh.

    Raises:
        SettingsError: a batch or mesh that does not fit the processes, 8-bit moments in host memory, or see `outline`.
        TeacherError, EvaluationError: see `outline`.
    """
    train, objective = run.train, run.objective
    if processes is None:
        processes = train.mesh.shard * (train.mesh.replicate or 1)
    micro = _check(run, processes)
    planned = outline(run)
    task, shard = planned.task, train.mesh.shard
    update = measure(planned, micro, shard > 1)
    students = [_Trained(task.generator, run.optim.generator, 1 / objective.critic_steps if task.critic else 1.0)]
    if task.critic is not None:
        students.append(_Trained(task.critic, run.optim.critic, 1.0))
    bf16, offload = task.bf16, train.offload
    network, frozen = shared_network(task.nets.teacher), planned.frozen_type
    blocks = task.swap.size if task.swap is not None else 0
    held = (sum(value.nbytes for value in network.parameters()) - blocks) // (shard if train.mesh.teacher else 1)
    kind = getattr(run.teacher, "quantize", None)
    parts = [Part(f"teacher, {f'{kind} and ' if kind else ''}{str(frozen).removeprefix('torch.')}", held)]
    if planned.perceptual:
        of = "perceptual distance" + (" and decoder" if planned.decoder else "")
        parts.append(Part(of, planned.perceptual + planned.decoder))
    averaged = train.ema_half_life > 0 or offload  # without an average there is no copy
    states = {student: student.state(averaged and student.player is task.generator) for student in students}
    checkpoint = sum(part.size for state in states.values() for part in state)
    for student, state in states.items():
        kept = student.rounded(bf16) if offload else state
        parts += [Part(part.name, part.size // student.processes(shard)) for part in kept]
    if shard > 1:
        parts.append(
            Part("blocks put together to compute with", _together(shared_network(task.generator.module), bf16))
        )
    several = shard > 1 or train.batch_size > processes * micro
    options = [student.update(update, shard, offload and bf16, several) for student in students]
    parts += max(options, key=lambda option: sum(part.size for part in option))
    return Plan(
        parameters=_parameters(planned),
        parts=tuple(parts),
        work=update.work,
        samples=train.images,
        micro_batch=micro,
        batch=train.batch_size,
        processes=processes,
        messages=_messages(run, students, update, train.batch_size / processes / micro, processes, planned),
        checkpoint=checkpoint,
        bf16=bf16,
        exact=train.precision == "fp32",
        offloading=replace(
            _offloading(students, checkpoint, bf16) if offload else Offloading(),
            blocks=blocks,
            swapped=update.swapped * train.batch_size / processes / micro,
        ),
        # averaged weights too; everything is float32 but the frozen teacher, which adapters share
        building=(
            parameter_count(network) * frozen.itemsize
            + sum(4 * student.count * (2 if student.player is task.generator else 1) for student in students)
            if shard > 1
            else 0
        ),
        pair=2 * 4 * math.prod(task.teacher.shape) if objective.needs_pairs else 0,
    )


def _check(run: DistillRun, processes: int) -> int:
    """Refuse a batch or mesh that does not fit the processes; returns the samples per forward."""
    mesh, batch = run.train.mesh, run.train.batch_size
    micro = run.train.micro_batch or max(1, batch // processes)
    if batch % (processes * micro):
        raise SettingsError(
            f"`train.batch_size` must be a multiple of {processes} processes x micro-batches of {micro}, got {batch}. Try: another "
            "--processes"
        )
    if processes % mesh.shard or (mesh.replicate or processes // mesh.shard) * mesh.shard != processes:
        raise SettingsError(
            f"`train.mesh` must divide {processes} processes, got shard {mesh.shard}"
            f"{f' x replicate {mesh.replicate}' if mesh.replicate else ''}. Try: --processes with a multiple of it"
        )
    if mesh.shard > 1 and not mesh.teacher and run.generator.lora and run.critic.lora:
        raise SettingsError(
            "`train.mesh.teacher` must be true if student and fake score are adapters on the teacher, got false. Try: "
            "leave it out"
        )
    check_frozen(run.teacher, run.adapters(), run.train)
    if run.train.offload:
        check_offload(run.optim.generator, run.optim.critic)
        if processes > 1:
            raise SettingsError(
                "`train.offload` must be false with several processes, got true. Try: split the networks (train.mesh.shard)"
            )
    return micro


@dataclass(frozen=True)
class _Trained:
    """A trained network.

    Attributes:
        player: the network.
        optim: its optimizer's settings.
        often: its updates per iteration.
    """

    player: Player[Any]
    optim: OptimSpec
    often: float

    @property
    def name(self) -> str:
        return "student" if self.player.name == "generator" else "fake score"

    @property
    def count(self) -> int:
        return parameter_count(self.player.module)

    @property
    def adapters(self) -> bool:
        return isinstance(self.player.module.denoiser, Adapted)

    def processes(self, shard: int) -> int:
        """Number of processes that it is split over; adapters are whole."""
        return 1 if self.adapters else shard

    def width(self, rounded: bool) -> int:
        """Bytes per weight on the GPU."""
        return 2 if rounded and not self.adapters else 4

    def state(self, averaged: bool) -> list[Part]:
        """Memory that it holds throughout the run."""
        moments = (8 if self.optim.first_moment else 4) * self.count
        if self.optim.kind == "adamw8bit":
            moments = 2 * (self.count + self.count // 64)  # a scale for 256 codes
        parts = [Part(f"{self.name}: weights, float32", 4 * self.count), Part(f"{self.name}: Adam's moments", moments)]
        return [*parts, Part(f"{self.name}: averaged weights", 4 * self.count)] if averaged else parts

    def rounded(self, bf16: bool) -> list[Part]:
        """Memory left on the GPU if the rest is offloaded."""
        width = self.width(bf16)
        return [Part(f"{self.name}: weights, {'bfloat16' if width == 2 else 'float32'}", width * self.count)]

    def update(self, update: Update, shard: int, rounded: bool, several: bool) -> list[Part]:
        """Memory of its update.

        Args:
            update: the measured update.
            shard: number of processes that whole networks are split over.
            rounded: whether weights and gradients have two bytes.
            several: whether gradients are held during another forward: of a later micro-batch, or another process's part.
        """
        peak = update.peaks[self.player.name]
        gradients = self.width(rounded) * self.count // self.processes(shard)
        copies = 0 if shard > 1 else peak.copies  # split networks travel in bfloat16
        activations = peak.alone if several else max(0, peak.size - gradients - copies)
        of = f"{self.name}'s update"
        parts = [Part(f"{of}: gradients", gradients), Part(f"{of}: activations", activations)]
        return [*parts, Part(f"{of}: bf16 copies of the weights", copies)] if copies else parts


def _parameters(planned: Outline) -> dict[str, tuple[int, int]]:
    task = planned.task
    found = {"teacher": (parameter_count(shared_network(task.nets.teacher)), 0)}
    for name, player in (("student", task.generator), ("fake score", task.critic)):
        if player is not None:
            denoiser: Denoiser = player.module.denoiser
            trained = parameter_count(player.module)
            found[name] = (trained - parameter_count(denoiser) + parameter_count(shared_network(denoiser)), trained)
    return found


def _offloading(students: list[_Trained], checkpoint: int, bf16: bool) -> Offloading:
    """Bytes that `train.offload` keeps and moves."""
    return Offloading(  # besides what a checkpoint holds, the gradients of an update and what they arrive in
        memory=checkpoint + max((4 if student.width(bf16) == 4 else 6) * student.count for student in students),
        moved=sum(student.often * student.count * 2 * student.width(bf16) for student in students),
        # of a weight: gradients widened and weights staged, gradients clipped (8), Adam's step (28), the average's (12)
        touched=sum(
            student.often
            * student.count
            * ((12 if student.width(bf16) == 2 else 8) + 8 + 28 + (12 if student.name == "student" else 0))
            for student in students
        ),
    )


def _messages(
    run: DistillRun, students: list[_Trained], update: Update, forwards: float, processes: int, planned: Outline
) -> tuple[Messages, ...]:
    """Messages of a process in an iteration of `forwards` micro-batches."""
    mesh, teacher = run.train.mesh, shared_network(planned.task.nets.teacher)
    whole = [student for student in students if student.processes(mesh.shard) == 1]
    averaged = Messages.averaging(4 * sum(student.often * student.count for student in whole), processes)
    if mesh.shard == 1:
        return (averaged,)
    width = 2 if planned.task.bf16 else 4
    gathered = width * sum(size for net, size in update.gathered.items() if mesh.teacher or net is not teacher)
    scattered = 4 * sum(update.scattered[s.player.name] for s in students if s not in whole)
    replicate = processes // mesh.shard
    return averaged, Messages.splitting(forwards * gathered, forwards * scattered, mesh.shard, replicate)


def _together(module: nn.Module, bf16: bool) -> int:
    """Bytes of a split network gathered at a time: the parts outside of blocks, the largest block, and the next one."""
    sizes = sorted(parameter_count(block) for block in blocks_of(module))
    outside = parameter_count(module) - sum(sizes)
    return (outside + sum(sizes[-2:])) * (2 if bf16 else 4)
