"""Model files: a typed record of the architecture (JSON) and the weights (safetensors), with provenance.

A model is two files, `NAME.safetensors` and `NAME.json`. The JSON holds the architecture, the schedule, a generator's
times, and the provenance (under the key `card`). Nothing in either file is ever executed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.generator import Generator, Transition, calls_at
from fewstep.diffusion.noise import Karras, ScheduleSpec
from fewstep.diffusion.preconditioned import Preconditioned, Prediction
from fewstep.formats.bounded import described_shapes
from fewstep.formats.dmd2 import CONDITIONING_SIGMA, dmd2_file, load_dmd2_generator
from fewstep.formats.edm import load_edm_pickle
from fewstep.networks import DiTSpec, NetSpec
from fewstep.networks.lora import Adapted, LoraSpec
from fewstep.system import distributed
from fewstep.system.bounds import SAMPLE_NUMBERS, reading, shown
from fewstep.system.errors import FileError
from fewstep.system.out_folder import check_out
from fewstep.system.outside import mention
from fewstep.system.record import Record
from fewstep.system.weights import first_not_finite, load_metadata, load_weights, save_weights

__all__ = [
    "DenoiserSpec", "Header", "check_same_source", "holds_generator", "import_model", "load_denoiser",
    "load_generator", "read_generator_weights", "read_header", "read_provenance", "save_denoiser", "save_generator",
    "weights_sha256",
]  # fmt: skip


class DenoiserSpec(Record):
    """Record of a denoiser: network, schedule, prediction."""

    net: NetSpec = DiTSpec()
    """The network inside."""
    schedule: ScheduleSpec = Karras()
    """Noise levels over time."""
    prediction: Prediction = "edm"
    """Prediction type of the network."""
    sigma_data: Annotated[float, Field(gt=0, lt=1e3, allow_inf_nan=False)] = 0.5
    """Standard deviation of the data (EDM preconditioning)."""

    def build(self) -> Preconditioned:
        """Build the denoiser with newly initialised weights."""
        return Preconditioned(self.net.build(), self.schedule, self.prediction, self.sigma_data)


class Header(BaseModel):
    """Content of a model's JSON."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)  # save_weights adds its own checksum entries

    format: Literal["fewstep/1", "fewstep/2"]  # 2 has a transition, which readers of 1 would ignore
    kind: Literal["denoiser", "generator"]
    denoiser: DenoiserSpec | None = None  # None: the teacher in `provenance.run.teacher` rebuilds it
    times: tuple[float, ...] = ()
    transition: Transition = "renoise"
    lora: LoraSpec | None = None
    provenance: dict[str, Any] = Field(default={}, alias="card")


def save_denoiser(path: Path, denoiser: Preconditioned, spec: DenoiserSpec, provenance: dict[str, Any]) -> None:
    """Write a denoiser to `path` (.safetensors) and its JSON. `provenance` is free-form JSON.

    All processes must call it if the network is split over them; rank 0 writes.
    """
    header = Header(format="fewstep/1", kind="denoiser", denoiser=spec, provenance=provenance)
    _write(path, denoiser, header)


def save_generator(path: Path, generator: Generator, spec: DenoiserSpec | None, provenance: dict[str, Any]) -> None:
    """Write a few-step generator to `path` (.safetensors) and its JSON; for adapters, only these.

    `spec` describes its denoiser. With None, the reader must provide the network (`load_generator`): for a distillation from
    a run file, the teacher named in `provenance["run"]`.

    All processes must call it if the network is split over them; rank 0 writes.
    """
    lora = generator.denoiser.spec if isinstance(generator.denoiser, Adapted) else None
    header = Header(
        format="fewstep/1" if generator.transition == "renoise" else "fewstep/2",
        kind="generator", denoiser=spec, times=generator.times, transition=generator.transition, lora=lora, provenance=provenance,
    )  # fmt: skip
    _write(path, generator.denoiser, header)


def load_denoiser(path: Path) -> tuple[Preconditioned, DenoiserSpec, dict[str, Any]]:
    """Read a denoiser. Returns it, its spec, and its provenance.

    Args:
        path: a .safetensors file of fewstep, a .pkl file of the EDM or SiD papers, or a checkpoint folder of DMD2 (the
            generator's network).

    Raises:
        FileError: missing, truncated, altered or unsupported files, weights that are not finite or do not fit their
            architecture, or a few-step student.
    """
    if dmd2_file(path) or Path(path).suffix == ".pkl":
        found, net, provenance = load_dmd2_generator(path) if dmd2_file(path) else load_edm_pickle(path)
        return found, DenoiserSpec(net=net, schedule=found.schedule, sigma_data=found.sigma_data), provenance
    tensors, header = _read(path)
    if header.kind == "generator":
        raise FileError(
            f"{path} must be a teacher (a denoiser at every noise level), got a few-step student, which knows its {len(header.times)} "
            f"level(s) only. Try: its own teacher ({header.provenance.get('teacher', 'not named in its JSON')}); to begin with this "
            "student's weights set start_from"
        )
    if header.denoiser is None:
        raise FileError(f"{path} must say what network it is, got a denoiser without one. Try: save it with its spec")
    denoiser = _built(header.denoiser, tensors, path)
    _fill(denoiser, tensors, path)
    return denoiser, header.denoiser, header.provenance


def holds_generator(path: Path, sigma_init: float | None = None) -> bool:
    """Return whether a file holds a few-step generator rather than a denoiser; a .pkl file does if `sigma_init` is given.

    No weights are read.

    Raises:
        FileError: missing or damaged files.
    """
    if Path(path).suffix == ".pkl":
        return sigma_init is not None
    return dmd2_file(path) is not None or _header(path, load_metadata(path)).kind == "generator"


def read_header(path: Path) -> Header:
    """Read a few-step generator's JSON, but no weights.

    Raises:
        FileError: missing or damaged files, or it holds a plain denoiser.
    """
    header = _header(path, load_metadata(path))
    _must_generate(header, path)
    return header


def read_provenance(path: Path) -> dict[str, Any]:
    """Read the provenance of a fewstep file, but no weights.

    Raises:
        FileError: missing or damaged files.
    """
    return _header(path, load_metadata(path)).provenance


def read_generator_weights(path: Path) -> dict[str, Tensor]:
    """Read a few-step generator's weights, by their names in its denoiser (for adapters, only theirs).

    Raises:
        FileError: missing or damaged files, or it holds a plain denoiser.
    """
    tensors, header = _read(path)
    _must_generate(header, path)
    return tensors


def weights_sha256(path: Path, provenance: dict[str, Any]) -> str:
    """Identify a model's weights: the sha256 of their file, from its JSON or a published model's provenance.

    Args:
        path: a file or folder that was loaded, so that this sha256 has been checked.
        provenance: provenance from loading it.

    Raises:
        FileError: missing or damaged files.
    """
    published = dmd2_file(path) is not None or Path(path).suffix == ".pkl"
    return str(provenance["source_sha256"] if published else load_metadata(path)["sha256"])


def load_generator(
    path: Path, sigma_init: float | None = None, player: Callable[[LoraSpec | None], Denoiser] | None = None
) -> tuple[Generator, DenoiserSpec | None, dict[str, Any]]:
    """Read a few-step generator. Returns it, its denoiser's spec if its file has one, and its provenance.

    Args:
        path: a .safetensors file of fewstep, a .pkl file of SiD or SiDA, or a checkpoint folder of DMD2.
        sigma_init: noise level of a published one-step generator, which its file does not state: 2.5 for SiD's (required);
            DMD2's default is 80.
        player: makes the denoiser to fill, with the file's adapters, if any (`Teacher.player`). Required for a file of
            adapters, and for one without a record of its network.

    Raises:
        FileError: as `load_denoiser`, or it holds a plain denoiser, or a required `player` is missing.
        ValueError: `sigma_init` lies outside the network's noise levels.
    """
    if dmd2_file(path) or Path(path).suffix == ".pkl":
        if dmd2_file(path) and sigma_init is None:
            sigma_init = CONDITIONING_SIGMA
        if sigma_init is None:
            raise FileError(
                f"`sigma_init` must be given for {path}, which does not say at which noise level it is called. Try: 2.5"
            )
        denoiser, spec, provenance = load_denoiser(path)
        return Generator(denoiser, calls_at(spec.schedule, [sigma_init], "sigma_init")), spec, provenance
    tensors, header = _read(path)
    _must_generate(header, path)
    made: Denoiser
    if header.lora is None and header.denoiser is not None:
        made = _built(header.denoiser, tensors, path)
    elif player is not None:
        if header.lora is not None and not any(header.lora.rank in value.shape for value in tensors.values()):
            raise FileError(f"{path} must hold adapters of rank {header.lora.rank}, which its JSON says: none has it")
        made = player(header.lora)
    else:
        holds = "holds low-rank adapters alone" if header.lora else "does not say what network it is"
        raise FileError(f"{path} {holds}: it needs its teacher. Try: load_generator(path, player=teacher.player)")
    _fill(made, tensors, path)
    try:
        generator = Generator(made, header.times, header.transition)
    except ValueError as error:
        raise FileError(f"{Path(path).with_suffix('.json')}: {error}") from None
    return generator, header.denoiser, header.provenance


def import_model(source: Path, folder: Path, sigma_init: float | None = None) -> Path:
    """Write a published model in fewstep's format; returns the .safetensors file.

    Args:
        source: an EDM or SiD .pkl file, or a checkpoint folder of DMD2.
        folder: output folder of `student.safetensors` for a generator (DMD2's, or any .pkl file with `sigma_init`), else of
            `teacher.safetensors`.
        sigma_init: see `load_generator`.

    Raises:
        FileError, OSError: the file cannot be read, or the folder cannot be written.
    """
    check_out(folder, "import")
    if sigma_init is not None and Path(source).suffix == ".safetensors":
        raise FileError(f"`sigma_init` must be left out for {source}, which says where it is called, got {sigma_init}")
    if holds_generator(source, sigma_init):
        generator, spec, provenance = load_generator(source, sigma_init)
        path = Path(folder) / "student.safetensors"
        check_same_source(path, provenance)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_generator(path, generator, spec, provenance)
    else:
        denoiser, spec, provenance = load_denoiser(source)
        path = Path(folder) / "teacher.safetensors"
        check_same_source(path, provenance)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_denoiser(path, denoiser, spec, provenance)
    return path


def check_same_source(path: Path, provenance: dict[str, Any]) -> None:
    """Refuse to write an imported model over another one.

    Raises:
        FileError: the folder holds another model, or one that cannot be read.
    """
    if path.exists() and (before := read_provenance(path)) != provenance:
        raise FileError(
            f"{path} must be new or an import of {provenance.get('source')}, got a model of {before.get('source', 'another origin')}. Try: "
            "another --out"
        )


def _write(path: Path, module: torch.nn.Module, header: Header) -> None:
    tensors = distributed.whole(module.state_dict())
    if distributed.rank() == 0:
        save_weights(
            path, {k: v.detach().cpu() for k, v in tensors.items()}, header.model_dump(mode="json", by_alias=True)
        )


def _read(path: Path) -> tuple[dict[str, Tensor], Header]:
    with reading(path):
        tensors, metadata = load_weights(path)
        header = _header(path, metadata)
    if (bad := first_not_finite(tensors)) is not None:
        raise FileError(
            f"{path} must hold finite weights, got NaN or infinite numbers in {bad}. Try: an earlier checkpoint, or get the "
            "file again"
        )
    return tensors, header


def _header(path: Path, metadata: dict[str, Any]) -> Header:
    named: Any = metadata
    for key in ("card", "run", "imports"):
        named = named.get(key) if isinstance(named, dict) else None
    mention(named if isinstance(named, list) else [], str(Path(path).with_suffix(".json")))
    try:
        return Header.model_validate(metadata)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(shown(str(part), quote=False) for part in first["loc"]) or "the file"
        message = shown(first["msg"].removeprefix("Value error, "), quote=False)
        odd = "" if first["type"] == "value_error" else "; is this a fewstep model?"
        raise FileError(f"{Path(path).with_suffix('.json')}: {where}: {message}{odd}") from None


def _must_generate(header: Header, path: Path) -> None:
    if header.kind != "generator":
        raise FileError(
            f"{path} holds a denoiser (a teacher), not a few-step generator. Try: distil it first (`fewstep distill`)"
        )


def _built(spec: DenoiserSpec, tensors: dict[str, Tensor], path: Path) -> Preconditioned:
    """Build the network of a file, unless it claims more than the file holds."""
    try:
        if type(spec.net).__module__.startswith("fewstep."):  # networks of others may not support the meta device
            described_shapes(spec.net.build, tensors)
        if torch.Size(spec.net.sample_shape).numel() > SAMPLE_NUMBERS:
            raise FileError(f"it describes samples of shape {list(spec.net.sample_shape)}, larger than any picture")
        return spec.build()
    except ValueError as error:
        raise FileError(f"{path} describes no network that can be built: {error}") from None


def _fill(denoiser: Denoiser, tensors: dict[str, Tensor], path: Path) -> None:
    own = denoiser.state_dict()
    problems = _differences(own, tensors)
    if problems:
        raise FileError(
            f"{path} does not fit the architecture in its JSON: {shown(problems[0], quote=False)}"
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
    kinds = [
        f"{name} is {other[name].dtype}, not of real numbers"
        for name in own.keys() & other.keys()
        if own[name].is_floating_point() and not other[name].is_floating_point()
    ]
    return sorted(missing + foreign + shapes + kinds)
