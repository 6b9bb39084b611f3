"""Weights files: one .safetensors file with a .json file of the same name that describes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fewstep.system.bounds import read_json, reading, shown
from fewstep.system.errors import FileError
from fewstep.system.files import file_sha256, write_atomically

FORMAT_VERSION = 1


def save_weights(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write `tensors` to `path` (`*.safetensors`), and `metadata` with the file's sha256 to its `.json`.

    Both are complete on disk before the first is renamed into place. Shared and strided tensors are stored as
    separate contiguous ones.

    Raises FileError for another suffix, metadata that is not JSON or has a key "sha256" (`load_weights`
    adds it), WriteError for a full disk or a folder that is missing.
    """
    path = _weights_path(path)
    if "sha256" in metadata:
        raise FileError(f"metadata of {path} must not have the reserved key sha256. Try: another name")
    blob = safetensors.torch.save({name: tensor.cpu() for name, tensor in separate(tensors).items()})
    record = {
        "format": "fewstep weights",
        "version": FORMAT_VERSION,
        "size": len(blob),
        "sha256": hashlib.sha256(blob).hexdigest(),
        "metadata": metadata,
    }
    try:
        text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise FileError(f"metadata of {path} is not JSON: {error}") from error
    write_atomically({path: blob, path.with_suffix(".json"): text.encode()})


def load_weights(path: Path | str, *, hashes: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read `(tensors, metadata)` as given to `save_weights`, on the CPU; `metadata["sha256"]` is the file's hash.

    The tensors are views of the mapped file: untouched parts take no memory, and processes of a machine share the rest.
    `hashes=False` skips the sha256 check, for processes other than the one that makes it.

    Raises FileError if one of the two files is missing, damaged, altered or of a newer format.
    """
    path, metadata = Path(path), load_metadata(path)
    if hashes and (actual := file_sha256(path)) != metadata["sha256"]:
        header = path.with_suffix(".json").name
        raise FileError(
            f"{path} has sha256 {actual}, {header} says {shown(metadata['sha256'], quote=False)}: {_way_out(path)}"
        )
    with reading(path):
        try:
            return safetensors.torch.load_file(path), metadata
        except safetensors.SafetensorError as error:
            why = shown(str(error), quote=False)
            raise FileError(f"{path} is not a safetensors file ({why}): {_way_out(path)}") from error


def load_metadata(path: Path | str) -> dict[str, Any]:
    """Read only the metadata of `load_weights`. Reads the JSON file and checks the size of the weights.

    Raises FileError if one of the two files is missing, the JSON damaged or of a newer format, or the weights truncated.
    """
    path = _weights_path(path)
    header, way_out = path.with_suffix(".json"), _way_out(path)
    for file in (path, header):
        if not file.is_file():
            raise FileError(f"{file} is missing: {way_out}")
    try:
        record = read_json(header)
        if record["format"] != "fewstep weights":
            raise ValueError(f"format {shown(record['format'])}")
        version, size, sha256 = record["version"], record["size"], record["sha256"]
        metadata = {**record["metadata"], "sha256": sha256}
    except FileError as error:
        raise FileError(f"{error}: {way_out}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise FileError(
            f"{header} does not describe fewstep weights ({shown(str(error), quote=False)}): {way_out}"
        ) from error
    check_version(header, version)
    if path.stat().st_size != size:
        raise FileError(f"{path} has {path.stat().st_size} bytes, {header.name} says {shown(size)}: {way_out}")
    return metadata


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or an infinite number; None if there is none.

    One pass: a sum is finite if all its terms are; only a tensor with another sum is checked value by value.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        value = tensor.detach().float() if tensor.element_size() < 2 else tensor.detach()  # float8 has no sum
        total = value.sum(dtype=torch.promote_types(value.dtype, torch.float32))
        if not torch.isfinite(total) and not torch.isfinite(value).all():  # the sum may overflow
            return name
    return None


def _way_out(path: Path) -> str:
    return f"copy {path.name} and {path.with_suffix('.json').name} again from where they came, or save them again"


def _weights_path(path: Path | str) -> Path:
    if Path(path).suffix != ".safetensors":
        raise FileError(f"weights must be in a *.safetensors file, got {path}")
    return Path(path)


def check_version(file: Path, version: object) -> None:
    if version != FORMAT_VERSION:
        raise FileError(
            f"{file} has format version {shown(version)}, this fewstep reads {FORMAT_VERSION}. Try: the fewstep that wrote it"
        )


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make tensors contiguous and without shared memory, as safetensors requires."""
    seen: set[tuple[torch.device, int]] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        memory = (local.device, local.untyped_storage().data_ptr())
        if memory in seen:
            tensor = tensor.clone()
        seen.add(memory)
        separate[name] = tensor
    return separate
