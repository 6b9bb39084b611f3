"""Models as files: what to build (a typed record) and its weights (safetensors), with a card that says where from.

A model is two files, `NAME.safetensors` and `NAME.json`. The JSON holds the architecture, the schedule, for generators
the times, and the card: nothing in either file is ever executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from fewstep.checkpoint import CheckpointError, load_weights, save_weights
from fewstep.denoiser import Preconditioned, Prediction
from fewstep.generator import Generator
from fewstep.nets import DiTSpec, NetSpec
from fewstep.noise import Karras, ScheduleSpec

__all__ = ["DenoiserSpec", "load_denoiser", "load_generator", "save_denoiser", "save_generator"]


class DenoiserSpec(BaseModel):
    """A denoiser to be built: network, schedule, prediction."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    net: NetSpec = DiTSpec()
    """The network inside."""
    schedule: ScheduleSpec = Karras()
    """Noise levels over time."""
    prediction: Prediction = "edm"
    """What the network predicts."""
    sigma_data: float = 0.5
    """Standard deviation of the data (EDM preconditioning)."""

    def build(self) -> Preconditioned:
        """The denoiser, freshly initialised."""
        return Preconditioned(self.net.build(), self.schedule, self.prediction, self.sigma_data)


class _Header(BaseModel):
    model_config = ConfigDict(extra="ignore")  # save_weights adds its own checksum entries

    format: Literal["fewstep/1"]
    kind: Literal["denoiser", "generator"]
    denoiser: DenoiserSpec
    times: tuple[float, ...] = ()
    card: dict[str, Any] = {}


def save_denoiser(path: Path, denoiser: Preconditioned, spec: DenoiserSpec, card: dict[str, Any]) -> None:
    """Write a denoiser to `path` (.safetensors) and its JSON beside it. `card`: provenance, free-form JSON."""
    header = _Header(format="fewstep/1", kind="denoiser", denoiser=spec, card=card)
    save_weights(path, _tensors(denoiser), header.model_dump(mode="json"))


def save_generator(path: Path, generator: Generator, spec: DenoiserSpec, card: dict[str, Any]) -> None:
    """Write a few-step generator to `path` (.safetensors) and its JSON beside it."""
    header = _Header(format="fewstep/1", kind="generator", denoiser=spec, times=generator.times, card=card)
    save_weights(path, _tensors(generator.denoiser), header.model_dump(mode="json"))


def load_denoiser(path: Path) -> tuple[Preconditioned, DenoiserSpec, dict[str, Any]]:
    """Read a denoiser; also the network inside a generator file. Returns it, its spec, and its card.

    Raises:
        CheckpointError: missing, truncated or altered files, or weights that do not fit the architecture named.
    """
    tensors, header = _read(path)
    denoiser = header.denoiser.build()
    _fill(denoiser, tensors, path)
    return denoiser, header.denoiser, header.card


def load_generator(path: Path) -> tuple[Generator, DenoiserSpec, dict[str, Any]]:
    """Read a few-step generator. Returns it, its denoiser's spec, and its card.

    Raises:
        CheckpointError: as `load_denoiser`, or if the file holds a plain denoiser without generator times.
    """
    tensors, header = _read(path)
    if header.kind != "generator":
        raise CheckpointError(
            f"{path} holds a denoiser (a teacher), not a few-step generator: distil it first (`fewstep distill`)"
        )
    denoiser = header.denoiser.build()
    _fill(denoiser, tensors, path)
    return Generator(denoiser, header.times), header.denoiser, header.card


def _tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}


def _read(path: Path) -> tuple[dict[str, Tensor], _Header]:
    tensors, metadata = load_weights(path)
    try:
        return tensors, _Header.model_validate(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CheckpointError(
            f"{Path(path).with_suffix('.json')}: {where}: {first['msg']}; is this a fewstep model?"
        ) from None


def _fill(denoiser: Preconditioned, tensors: dict[str, Tensor], path: Path) -> None:
    own = denoiser.state_dict()
    problems = _differences(own, tensors)
    if problems:
        raise CheckpointError(
            f"{path} does not fit the architecture in its JSON: {problems[0]}"
            + (f" (and {len(problems) - 1} more)" if problems[1:] else "")
        )
    denoiser.load_state_dict(tensors)


def _differences(own: dict[str, Tensor], other: dict[str, Tensor]) -> Sequence[str]:
    missing = [f"{name} is missing" for name in own.keys() - other.keys()]
    foreign = [f"{name} is unknown" for name in other.keys() - own.keys()]
    shapes = [
        f"{name} is {list(other[name].shape)} where {list(own[name].shape)} was expected"
        for name in own.keys() & other.keys()
        if own[name].shape != other[name].shape
    ]
    return sorted(missing + foreign + shapes)
