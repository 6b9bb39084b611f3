"""Conversion of published few-step text-to-image students (whole UNets and LoRA files) to fewstep's format.

DMD2's releases are `dmd2_sdxl_4step_unet_fp16.bin|.safetensors`, `dmd2_sdxl_1step_unet_fp16.bin` (diffusers' names),
`dmd2_sdxl_4step_lora_fp16.safetensors` (kohya's names, rank 64, alpha 8); its training folders hold `pytorch_model.bin`.
The files do not state their base model or timesteps: the user gives both. Nothing in a file is executed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise import Discrete
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.formats.lora import Factors, merge
from fewstep.formats.lora_reading import read_lora
from fewstep.formats.model import check_same_source, save_generator
from fewstep.networks.lora import Adapted, LoraSpec
from fewstep.system.errors import FileError
from fewstep.system.weights import first_not_finite
from fewstep.teachers import DiffusersTeacher

__all__ = ["import_student"]

NETWORK = "net.model."  # prefix of diffusers' network in a text-to-image denoiser
PREFIXES = ("unet.", "base_model.model.", "model.diffusion_model.", "")


def import_student(
    file: Path, pipeline: DiffusersTeacher, timesteps: Sequence[int], folder: Path
) -> tuple[Path, list[str]]:
    """Write a published text-to-image student in fewstep's format; returns the .safetensors file, and notes for the user.

    Args:
        file: a whole network, or a LoRA in any form that `fewstep.formats.lora` reads; a file or a folder.
        pipeline: the student's base pipeline.
        timesteps: the student's timesteps, noisiest first.
        folder: output folder of `student.safetensors`.

    Raises:
        FileError: the weights do not fit the pipeline's network, or the network cannot be imported.
        FileError, OSError: the file is damaged, in an unknown form, or a LoRA of another network.
        TeacherError: the pipeline cannot be read.
    """
    if not timesteps or any(later >= earlier for earlier, later in itertools.pairwise(timesteps)):
        raise FileError(f"`timesteps` must be given and fall strictly, got {list(timesteps)}. Try: 999,749,499,249")
    given = read_lora(file)
    if (bad := first_not_finite(given.whole)) is not None:
        raise FileError(
            f"{file} must hold finite weights, got NaN or infinite numbers in {bad}. Try: download it again"
        )
    teacher = pipeline.load()
    schedule = teacher.denoiser.schedule
    if not isinstance(schedule, Discrete):
        raise FileError(f"`pipeline` must have a table of timesteps (a UNet), got {pipeline.path}, which has none")
    last = len(schedule.alphas_cumprod) - 1
    if not all(0 < step <= last for step in timesteps):
        raise FileError(f"`timesteps` must lie in 1 .. {last}, got {list(timesteps)}")
    notes = list(given.notes)
    if not given.layers:
        denoiser = _whole(teacher.start(), given.whole, file)
    else:
        if given.text_keys:
            raise FileError(
                f"{file}: {len(given.text_keys)} of its {given.count} keys are of text encoders, such as {given.text_keys[0]}, "
                "but a student is only a network. Try: a file without them, or merge it into the pipeline first"
            )
        factors = given.for_network(teacher.denoiser.get_submodule("net.model"))
        if odd := [path for path, change in factors.items() if not _low_rank(teacher.denoiser, path, change)]:
            notes.append(
                f"{len(odd)} of the {len(factors)} layers in {file} are not plain low-rank terms (DoRA, or grouped convolutions), such "
                f"as {odd[0]}: the student is the whole network with the LoRA merged"
            )
            denoiser = teacher.start().requires_grad_(False)
            merge(denoiser.get_submodule("net.model"), factors)
        else:
            denoiser = _adapted(teacher.denoiser, factors)
    provenance = {
        "source": file.name,
        "teacher": pipeline.path,
        "run": {"teacher": pipeline.model_dump(mode="json", exclude_none=True), "objective": {"method": "published"}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "student.safetensors"
    check_same_source(path, provenance)
    save_generator(path, Generator(denoiser, [step / last for step in timesteps]), teacher.student_spec, provenance)
    return path, notes


def _low_rank(base: Denoiser, path: str, change: Factors) -> bool:
    """Return whether an adapter can hold a change of a layer."""
    layer = base.get_submodule(f"{NETWORK}{path}")
    return change.magnitude is None and getattr(layer, "groups", 1) == 1


def _whole(denoiser: Any, tensors: Mapping[str, Tensor], file: Path) -> Denoiser:
    """Load the file's weights into the network, whatever prefix their names have."""
    own = denoiser.net.model.state_dict()
    for prefix in PREFIXES:
        given = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if own.keys() <= given.keys():
            wrong = [name for name in own if own[name].shape != given[name].shape]
            if wrong:
                raise FileError(
                    f"{file} must have the pipeline's architecture, got {wrong[0]} of shape {list(given[wrong[0]].shape)}; the pipeline "
                    f"has {list(own[wrong[0]].shape)}"
                )
            denoiser.net.model.load_state_dict({name: given[name].float() for name in own})
            return denoiser.requires_grad_(False)
    missing = sorted(own.keys() - tensors.keys())
    raise FileError(
        f"{file} must hold a network of this pipeline, with {len(own)} weights, got {len(tensors)} tensors without "
        f"{missing[0]}"
    )


def _adapted(base: Denoiser, factors: Mapping[str, Factors]) -> Denoiser:
    """Add the file's adapters to the pipeline's network. Lower ranks are padded to the largest."""
    kinds = {(change.rank, change.alpha) for change in factors.values()}
    rank, alpha = next(iter(kinds))
    uniform = len(kinds) == 1 and alpha > 0
    if not uniform:
        rank = max(rank for rank, _ in kinds)
        alpha = float(rank)  # scale 1: each layer's scale is multiplied into B
    spec = LoraSpec(rank=rank, alpha=alpha, targets=tuple(sorted(f"{NETWORK}{path}" for path in factors)))
    adapted = Adapted(cast(Preconditioned, base), spec)
    with torch.no_grad():
        for name, adapter in adapted.adapters().items():
            change = factors[name.removeprefix(NETWORK)]
            scale = 1.0 if uniform else change.alpha / change.rank
            adapter.down.zero_()[: change.rank] = change.down
            adapter.up.zero_()[:, : change.rank] = scale * change.up.reshape(len(change.up), -1, *adapter.up.shape[2:])
    return adapted.requires_grad_(False)
