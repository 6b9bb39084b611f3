"""Reader of DMD2's ImageNet checkpoints: folders of `torch.save` or safetensors files, read without executing anything in them.

`pytorch_model.bin` is the generator; `pytorch_model_1.bin`, if present, holds `fake_unet.*`, the GAN head
`cls_pred_branch.*` and a copy of the teacher (Yin et al. 2024, arXiv 2405.14867, https://github.com/tianweiy/DMD2). Newer
accelerate calls them `model.safetensors` and `model_1.safetensors`. The files do not name their network: it is recognised
from names and shapes of the weights.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.formats.bounded import check_real, check_tensors
from fewstep.formats.edm import filled_denoiser
from fewstep.networks import DhariwalUNetSpec
from fewstep.system.bounds import reading, regular_file, shown
from fewstep.system.data_pickle import DAMAGE, DataUnpickler, Record, Table
from fewstep.system.errors import FileError
from fewstep.system.files import file_sha256
from fewstep.system.tensors import read_entries
from fewstep.system.weights import first_not_finite

__all__ = ["CONDITIONING_SIGMA", "dmd2_file", "load_dmd2_critic", "load_dmd2_generator", "read_tensors"]

CONDITIONING_SIGMA = 80.0  # noise level of the authors' one-step generators
GUIDANCE = {
    "pytorch_model.bin": "pytorch_model_1.bin",
    "model.safetensors": "model_1.safetensors",
}  # by the generator's name
HEAD, LAYER = "cls_pred_branch.", "map_layer0.weight"
MOST_DESCRIPTION = 1 << 26  # bytes of the names and shapes in a file; SDXL's have 0.3 MB


def dmd2_file(path: Path) -> Path | None:
    """Find the generator's file if `path` is such a folder or the file itself, else None.

    Raises:
        FileError: a `model.safetensors` that is damaged.
    """
    path = Path(path)
    for file in [path / name for name in GUIDANCE] if path.is_dir() else [path]:
        if file.is_file() and (file.suffix == ".bin" or _is_adm(file)):
            return file
    return None


def _is_adm(file: Path) -> bool:
    """Return whether a file called `model.safetensors`, as many programs' are, is of DMD2's ImageNet program."""
    described = file.with_suffix(".json").exists() or file.with_name("config.json").exists()
    return file.name == "model.safetensors" and not described and f"model.{LAYER}" in read_entries(file)


def load_dmd2_generator(path: Path) -> tuple[Preconditioned, DhariwalUNetSpec, dict[str, Any]]:
    """Read the network of a one-step generator, to be called at `CONDITIONING_SIGMA`.

    Args:
        path: the checkpoint folder, or the generator's file in it.

    Returns:
        The denoiser (float32), its network's spec, and its provenance.

    Raises:
        FileError: the file is damaged, holds more than tensors, or holds weights of an unsupported network.
        OSError: it cannot be opened.
    """
    file = dmd2_file(path)
    if file is None:
        raise FileError(f"{path} holds no {' or '.join(GUIDANCE)}. Try: give the folder of a DMD2 ImageNet checkpoint")
    held = read_tensors(file)
    try:
        weights = _part(held, "model.")
        spec = adm_spec(weights)
        denoiser = filled_denoiser(spec, 0.5, weights)
    except FileError as error:
        raise FileError(f"{file}: {error}") from None
    return denoiser, spec, {"source": f"{file.parent.name}/{file.name}", "source_sha256": file_sha256(file)}


def load_dmd2_critic(path: Path) -> dict[str, Tensor] | None:
    """Read the fake score (`denoiser.*`) and the GAN head (`head.*`) with the names of a `Critic`; None without the file.

    Raises:
        FileError, OSError: the file is damaged, or holds no fake score.
    """
    file = dmd2_file(path)
    guidance = file.with_name(GUIDANCE[file.name]) if file and file.name in GUIDANCE else None
    if guidance is None or not guidance.is_file():
        return None
    weights = read_tensors(guidance)
    fake = _part(weights, "fake_unet.model.")
    if not fake:
        raise FileError(f"{guidance} holds no fake_unet: is it of DMD2's ImageNet program?")
    head = _part(weights, HEAD)
    if (bad := first_not_finite(fake | head)) is not None:
        raise FileError(f"{guidance} must hold finite weights, got NaN or infinite numbers in {bad}: fetch it again")
    return {f"denoiser.net.{name}": value for name, value in fake.items()} | {
        f"head.{name}": value for name, value in head.items()
    }


def adm_spec(weights: Mapping[str, Tensor]) -> DhariwalUNetSpec:
    """Find the ADM network whose weights have these names and shapes.

    Raises:
        FileError: no such network.
    """
    try:
        first = next(name for name in weights if re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", name))
        size = int(first.split(".")[1].split("x")[0])
        width = weights[LAYER].shape[1]
        blocks = [name for name in weights if re.fullmatch(r"enc\.\d+x\d+_block\d+\.conv1\.weight", name)]
        sides = sorted({int(name.split(".")[1].split("x")[0]) for name in blocks}, reverse=True)
        return DhariwalUNetSpec(
            size=size,
            channels=weights[first].shape[1],
            num_classes=weights["map_label.weight"].shape[1] if "map_label.weight" in weights else 0,
            model_channels=width,
            channel_mult=tuple(weights[f"enc.{s}x{s}_block0.conv1.weight"].shape[0] // width for s in sides),
            num_blocks=sum(name.startswith(f"enc.{size}x{size}_block") for name in blocks),
            attn_resolutions=tuple(s for s in sides if f"enc.{s}x{s}_block0.qkv.weight" in weights),
        )
    except (StopIteration, KeyError, IndexError, ZeroDivisionError, ValueError):
        raise FileError("its weights are not those of an ADM network") from None


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Weights whose names begin with `prefix`, without it, in float32; FileError if they are whole numbers."""
    part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    check_real(part)
    return {name: value.float() for name, value in part.items()}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file, or a `torch.save` file that holds only a table of tensors.

    Raises:
        FileError, OSError: it is damaged, holds anything else, or cannot be opened.
    """
    regular_file(file)
    if file.suffix == ".safetensors":
        with reading(file):
            return safetensors.torch.load_file(file)
    with reading(file):
        try:
            zipped = zipfile.is_zipfile(file)
            if zipped:
                _check_description(file)
            # files of torch below 1.6 are no zip, and cannot be mapped into memory
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            why = shown((str(error).splitlines() or [""])[0], quote=False)
            raise FileError(f"{file} is damaged, or holds more than tensors ({why}): do not trust it") from None
        except (*DAMAGE, zipfile.BadZipFile) as error:
            why = shown((str(error).splitlines() or [type(error).__name__])[0], quote=False)
            raise FileError(f"{file} is damaged ({why}). Try: fetch it again and compare its checksum") from None
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise FileError(f"{file} holds no table of tensors: is it a file of DMD2's program?")
    try:
        check_tensors(found, file.stat().st_size)
    except FileError as error:
        raise FileError(f"{file}: {error}: do not trust it") from None
    return found


class _Anything(Record):
    """Whatever a name stands for; `torch.load` decides which of them it takes."""


class _Names(dict[tuple[str, str], Any]):
    """Inert records for all names."""

    def __missing__(self, name: tuple[str, str]) -> Any:
        return Table if name[1] == "OrderedDict" else _Anything


class _Description(DataUnpickler):
    """Reads a `torch.save` file's table without its tensors."""

    names = _Names()
    what = "a table of tensors"

    def persistent_load(self, pid: Any) -> Any:
        return None


def _check_description(file: Path) -> None:
    """Refuse a table that takes forever to read, such as one whose keys are nested tuples.

    Raises:
        FileError: it does, or it is larger than that of any network.
    """
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.filename.endswith("data.pkl"):
                if member.file_size > MOST_DESCRIPTION:
                    raise FileError(f"{file} has a table of {member.file_size:,} bytes, more than any network's")
                try:
                    _Description(io.BytesIO(archive.read(member))).load()
                except FileError as error:
                    raise FileError(
                        f"{file} is damaged, or holds more than tensors ({error}): do not trust it"
                    ) from None
