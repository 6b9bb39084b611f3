"""A run's networks and update on the meta device: sizes and operations without weights in memory.

Teachers are built from their configuration if possible; otherwise they are loaded and their weights dropped.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fewstep.data import ImageDataset
from fewstep.diffusion.denoiser import Cond, Denoiser
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.evaluation.perceptual import Decoded, Perceptual, perceptual_outline
from fewstep.methods.base import Pairs
from fewstep.methods.pairs import PairSet
from fewstep.networks import FAMILIES
from fewstep.networks.diffusers_net import DiffusersNet, DiffusersSpec
from fewstep.networks.placement import narrow
from fewstep.run.specs import DistillRun
from fewstep.system.console import note, quiet
from fewstep.system.distributed import MeshSpec
from fewstep.system.errors import SettingsError
from fewstep.teachers import ClassLabels, Conditioner, DiffusersTeacher, NativeTeacher, Teacher
from fewstep.training.distill import Distillation, Setup
from fewstep.training.player import shared_network

__all__ = ["Outline", "outline"]

META = torch.device("meta")
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Outline:
    """A distillation without storage.

    Attributes:
        task: the task; its update can be run, but not optimizer steps.
        frozen_type: dtype of the teacher's weights.
        perceptual: bytes of the perceptual distance's frozen networks.
        decoder: bytes of its decoder; 0 without one.
    """

    task: Distillation
    frozen_type: torch.dtype
    perceptual: int = 0
    decoder: int = 0


def outline(run: DistillRun) -> Outline:
    """Build a run's distillation on the meta device for one process without a mesh, with stand-ins for data and pairs.

    Raises:
        TeacherError: no configuration of the teacher, or guidance for a model without conditions.
        SettingsError: a setting does not fit the networks, or pairs need the codec of a teacher that must be loaded.
        EvaluationError: the method needs LPIPS, and its packages are not installed.
    """
    with torch.random.fork_rng(devices=[]):
        teacher = _teacher(run)
        pairs, perceptual, frozen, decoder = None, None, 0, 0
        if run.objective.needs_pairs:
            pairs = cast(PairSet, _NoPairs(teacher.shape))
            perceptual, frozen, decoder = _perceptual(run, teacher)
        bf16 = run.train.precision in ("bf16", "auto")
        train = run.train.model_copy(
            update={
                "device": "meta",
                "precision": "bf16" if bf16 else "fp32",
                "ema_half_life": 0.0,
                "compile": False,
                "offload": False,
                "mesh": MeshSpec(),
            }
        )
        calls = len(run.generator.timesteps or run.generator.times or run.generator.sigmas or ())
        task = Distillation(
            Setup(
                teacher,
                tuple(1 - k / calls for k in range(calls)),  # the times do not affect the cost
                run.objective,
                train,
                run.optim.generator.model_copy(update={"kind": "adam"}),
                run.optim.critic.model_copy(update={"kind": "adam"}),
                dataset=_images(teacher.shape) if run.objective.needs_real else None,
                pairs=pairs,
                perceptual=perceptual,
                generator_lora=run.generator.lora,
                critic_lora=run.critic.lora,
                transition=run.generator.transition,
            )
        )
        if run.train.offload and bf16:
            for player in task.players:
                narrow(player.module.denoiser)
    return Outline(task, _frozen_type(task.nets.teacher), frozen, decoder)


def _frozen_type(teacher: Denoiser) -> torch.dtype:
    network = shared_network(teacher)
    if isinstance(network, Preconditioned) and isinstance(network.net, DiffusersNet) and network.net.dtype is not None:
        return network.net.dtype  # quantised
    return next((value.dtype for value in network.parameters()), torch.float32)


def _teacher(run: DistillRun) -> Teacher:
    spec = run.teacher
    if not isinstance(spec, DiffusersTeacher | NativeTeacher):
        note(
            f"loading the teacher (kind {spec.kind}) to plan the run: its networks cannot be built from a configuration"
        )
        return _without_weights(spec.load())
    about, cond = spec.outline()
    guided_inside = False
    conditioner: Conditioner = _Shapes(cond)
    if isinstance(about.net, DiffusersSpec):
        guided_inside = FAMILIES[about.net.model].guided_inside(about.net.config)
    elif isinstance(spec, NativeTeacher):
        conditioner = ClassLabels(about.net.num_classes)

    def build() -> Preconditioned:
        with META:
            return about.build()

    def start() -> Preconditioned:
        built = build().train()
        return spec.with_dropout(built) if isinstance(spec, NativeTeacher) else built

    denoiser = build().requires_grad_(False).eval()
    if isinstance(spec, DiffusersTeacher):
        with quiet():
            denoiser.net.to(getattr(torch, spec.dtype))
        if spec.quantize is not None:
            cast(DiffusersNet, denoiser.net).quantize(spec.quantize)
    return Teacher(
        name=spec.path,
        denoiser=denoiser,
        shape=tuple(about.net.sample_shape),
        conditioner=conditioner,
        student_spec=about,
        start=start,
        bottleneck=about.net.bottleneck,
        guided_inside=guided_inside,
    )


def _without_weights(teacher: Teacher) -> Teacher:
    return replace(teacher, denoiser=_on_meta(teacher.denoiser), start=lambda: _on_meta(teacher.start()))


def _on_meta(module: Network) -> Network:
    """Copy a module without storage."""
    made: dict[int, object] = {}
    for value in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(value, device=META)
        is_parameter = isinstance(value, nn.Parameter)
        made[id(value)] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
    return copy.deepcopy(module, made)


def _perceptual(run: DistillRun, teacher: Teacher) -> tuple[Perceptual, int, int]:
    """Distance for pairs, with the bytes of its networks and of its decoder."""
    decoder: Any = None
    if isinstance(run.teacher, DiffusersTeacher):
        decoder = run.teacher.outline_decoder()
    elif teacher.codec is not None:
        raise SettingsError(
            f"plan must know the decoder of the teacher to count what pairs take, got a codec of teacher {run.teacher.kind}. "
            "Try: `fewstep bench`, which runs an update"
        )

    def decode(samples: Tensor) -> Tensor:
        picture: Tensor = decoder.decode(samples, return_dict=False)[0]
        return picture

    shape = teacher.shape
    if decoder is not None:
        with torch.no_grad():
            shape = tuple(decode(torch.zeros(1, *teacher.shape, device=META)).shape[1:])
    perceptual = perceptual_outline(cast(tuple[int, int, int], shape), run.perceptual)
    if decoder is None:
        return perceptual, _size(perceptual.net), 0
    return Decoded(perceptual, decode), _size(perceptual.net), _size(decoder)


def _size(module: nn.Module) -> int:
    return sum(value.nbytes for value in (*module.parameters(), *module.buffers()))


class _Shapes(Conditioner):
    """Conditions with known sizes but no values."""

    num_classes, names = 1, ("",)

    def __init__(self, cond: Cond) -> None:
        self._cond = cond

    def cond(self, labels: Tensor | None, count: int) -> dict[str, Tensor]:
        return {name: value.new_zeros(count, *value.shape[1:]) for name, value in self._cond.items()}

    def null(self, cond: Cond) -> Cond:
        return dict(cond)


class _NoImages:
    """Stand-in for a dataset's images of the same size, decoded on demand."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = torch.Size((1, *shape))

    def __getitem__(self, indices: Tensor | slice | int) -> Tensor:
        assert isinstance(indices, Tensor)
        return torch.zeros(len(indices), *self.shape[1:], device=META)


def _images(shape: tuple[int, ...]) -> ImageDataset:
    return ImageDataset("outline", _NoImages(shape), source="outline")


class _NoPairs:
    """Stand-in for a folder of pairs."""

    fingerprint = ""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __len__(self) -> int:
        return 1

    def batch(self, indices: Tensor, conditioner: Conditioner, device: torch.device) -> Pairs:
        z, y = (torch.zeros(len(indices), *self._shape, device=device) for _ in range(2))
        return Pairs(z, y, {name: value.to(device) for name, value in conditioner.cond(None, len(indices)).items()})
