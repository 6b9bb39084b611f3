"""Few-step students of text-to-image models that others published: whole UNets and LoRA files, to our own format.

DMD2's releases are `dmd2_sdxl_4step_unet_fp16.bin|.safetensors`, `dmd2_sdxl_1step_unet_fp16.bin` (diffusers' names),
`dmd2_sdxl_4step_lora_fp16.safetensors` (kohya's names, rank 64, alpha 8); its training folders hold `pytorch_model.bin`.
None of them says what it was trained on or at which timesteps: whoever imports it does. Nothing in a file is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.denoiser import Denoiser
from fewstep.dmd2_files import read_tensors
from fewstep.edm_files import EdmFileError
from fewstep.generator import Generator
from fewstep.lora import Adapted, LoraSpec
from fewstep.model import save_generator
from fewstep.noise import Discrete
from fewstep.teachers import DiffusersTeacher

__all__ = ["PublishedError", "import_student"]

PREFIXES = ("unet.", "base_model.model.", "model.diffusion_model.", "")


class PublishedError(ValueError):
    """A published student that is not of the pipeline it is said to be of, or cannot be read."""


def import_student(file: Path, pipeline: DiffusersTeacher, timesteps: Sequence[int], folder: Path) -> Path:
    """Write a published text-to-image student in our own format; returns the .safetensors file.

    Args:
        file: a whole network or a LoRA, .safetensors or .bin.
        pipeline: what it is a student of.
        timesteps: where it is called, noisiest first.
        folder: where to write `student.safetensors`.

    Raises:
        PublishedError: the weights do not fit the pipeline's network, or are in a form that is not known.
        EdmFileError, OSError: the file is damaged, or holds more than tensors.
        TeacherError: the pipeline cannot be read.
    """
    tensors, metadata = _read(file)
    teacher = pipeline.load()
    schedule = teacher.denoiser.schedule
    if not isinstance(schedule, Discrete):
        raise PublishedError(f"{pipeline.path} has no table of timesteps: only students of UNets can be imported")
    last = len(schedule.alphas_cumprod) - 1
    if not all(0 < step <= last for step in timesteps):
        raise PublishedError(f"timesteps {list(timesteps)} must lie in 1 .. {last}")
    lora = any(".lora_" in name for name in tensors)
    denoiser = _adapted(teacher.denoiser, tensors, metadata, file) if lora else _whole(teacher.start(), tensors, file)
    card = {
        "source": file.name,
        "teacher": pipeline.path,
        "run": {"teacher": pipeline.model_dump(mode="json", exclude_none=True), "objective": {"method": "published"}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "student.safetensors"
    save_generator(path, Generator(denoiser, [step / last for step in timesteps]), teacher.student_spec, card)
    return path


def _whole(denoiser: Any, tensors: Mapping[str, Tensor], file: Path) -> Denoiser:
    """The network with the file's weights, whatever stands before their names."""
    own = denoiser.net.model.state_dict()
    for prefix in PREFIXES:
        given = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if own.keys() <= given.keys():
            wrong = [name for name in own if own[name].shape != given[name].shape]
            if wrong:
                raise PublishedError(
                    f"{file}: {wrong[0]} is {list(given[wrong[0]].shape)}, the pipeline's {list(own[wrong[0]].shape)}: it is of "
                    "another architecture"
                )
            denoiser.net.model.load_state_dict({name: given[name].float() for name in own})
            return denoiser.requires_grad_(False)
    missing = sorted(own.keys() - tensors.keys())
    raise PublishedError(
        f"{file} holds {len(tensors)} tensors, among them no {missing[0]}: it is no network of this pipeline, whose weights have "
        f"{len(own)} names"
    )


def _adapted(base: Denoiser, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path) -> Denoiser:
    """The pipeline's network with the file's adapters, in kohya's or PEFT's names."""
    prefix = "net.model."
    layers = {
        name.removeprefix(prefix): module
        for name, module in base.named_modules()
        if name.startswith(prefix) and isinstance(module, nn.Linear | nn.Conv2d)
    }
    underscored = {path.replace(".", "_"): path for path in layers}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        found = re.fullmatch(
            r"(?P<layer>.+?)\.(?:(?P<kohya>lora_down|lora_up)(?:\.weight)|(?P<peft>lora_A|lora_B)(?:\.default)?\.weight|alpha)",
            name,
        )
        if found is None:
            if "base_layer" in name:  # a training folder of PEFT keeps the frozen weights beside the adapters
                continue
            raise PublishedError(
                f"{file}: {name} is no part of a LoRA that is known here (kohya's and PEFT's forms are)"
            )
        layer = found["layer"].removeprefix("lora_unet_")
        for start in PREFIXES:
            layer = layer.removeprefix(start)
        path = underscored.get(layer, layer)
        if path not in layers:
            raise PublishedError(
                f"{file}: there is no layer {path} in the pipeline's network: it is of another architecture"
            )
        part = {"lora_down": "down", "lora_A": "down", "lora_up": "up", "lora_B": "up"}.get(
            found["kohya"] or found["peft"], "alpha"
        )
        pairs.setdefault(path, {})[part] = value.float()
    ranks = {len(pair["down"]) for pair in pairs.values() if "down" in pair}
    if len(ranks) != 1 or any({"down", "up"} - pair.keys() for pair in pairs.values()):
        raise PublishedError(
            f"{file}: layers of ranks {sorted(ranks)}, or without one of the two matrices: one rank is known here"
        )
    rank = ranks.pop()
    alphas = {float(pair["alpha"]) if "alpha" in pair else _alpha(metadata, rank) for pair in pairs.values()}
    if len(alphas) != 1:
        raise PublishedError(f"{file}: layers of alpha {sorted(alphas)}: one for all is known here")
    adapted = Adapted(base, LoraSpec(rank=rank, alpha=alphas.pop(), targets=tuple(sorted(pairs))))
    with torch.no_grad():
        for name, adapter in adapted.adapters().items():
            pair = pairs[name.removeprefix(prefix)]
            for own, given in ((adapter.down, pair["down"]), (adapter.up, pair["up"])):
                if own.shape != given.shape:
                    raise PublishedError(
                        f"{file}: {name} has a matrix {list(given.shape)} where {list(own.shape)} was expected"
                    )
                own.copy_(given)
    return adapted.requires_grad_(False)


def _alpha(metadata: Mapping[str, str], rank: int) -> float:
    """PEFT's alpha from the file's metadata, else the rank, as PEFT itself takes it."""
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    found = next((value for key, value in config.items() if key.rsplit(".", 1)[-1] == "lora_alpha"), rank)
    return float(found)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    file = file / "pytorch_model.bin" if file.is_dir() else file
    if not file.is_file():
        raise PublishedError(f"{file} does not exist")
    if file.suffix != ".safetensors":
        return read_tensors(file), {}
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise EdmFileError(f"{file} is damaged ({error}): fetch it again and compare its checksum") from None
