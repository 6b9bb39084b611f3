"""Read and write large .safetensors files one tensor at a time, so that memory holds only one tensor.

The safetensors library maps files into memory, which counts as the process's own until the file is closed, so this module
uses plain reads. The format: 8 bytes with the length of a JSON header, the header, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.system.bounds import parse_json, shown
from fewstep.system.errors import FileError
from fewstep.system.files import TEMPORARY, remove_abandoned, sync_folder, write_error
from fewstep.system.interrupt import uninterrupted
from fewstep.system.weights import first_not_finite

__all__ = ["Entry", "entries_of", "read_entries", "write_entries"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that is read or computed on demand.

    Attributes:
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        make: returns the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def then(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> Entry:
        """Entry of the changed tensor, in float32 or with the same dtype."""
        return Entry(self.shape if shape is None else shape, self.dtype, lambda: change(self.make()))


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Make entries of tensors in memory."""
    return {name: Entry(tuple(value.shape), value.dtype, lambda value=value: value) for name, value in tensors.items()}  # type: ignore[misc]


def read_entries(path: Path) -> dict[str, Entry]:
    """List the tensors of a .safetensors file by name. Reads the header now, and tensors on demand.

    Raises:
        FileError: it is missing or damaged.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > os.fstat(file.fileno()).st_size:
                raise ValueError("its header is longer than the file")
            header = parse_json(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, about in header.items():
            first, last = about["data_offsets"]
            dtype, shape = _DTYPES[about["dtype"]], tuple(about["shape"])
            size = os.path.getsize(path) - 8 - length
            whole = all(type(n) is int and n >= 0 for n in (first, last, *shape)) and first <= last <= size
            if not whole or math.prod(shape) * dtype.itemsize != last - first:
                raise ValueError(f"{shown(name)} does not have the bytes that it claims")
            found[name] = Entry(shape, dtype, _reader(path, 8 + length + first, last - first, dtype, shape))
        return found
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise FileError(
            f"{path} is not a whole .safetensors file ({shown(str(error), quote=False)}). Try: fetch it again"
        ) from None


def _reader(path: Path, start: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        data = bytearray(size)
        with open(path, "rb") as file:
            file.seek(start)
            if file.readinto(data) != size:
                raise FileError(f"{path} ends within its tensors. Try: fetch it again")
        if not size:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    return read


def write_entries(
    path: Path,
    entries: Mapping[str, Entry],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a .safetensors file atomically.

    Args:
        path: the file.
        entries: the tensors by name; each is made once, written and dropped.
        dtype: dtype of floating-point tensors; None: unchanged.
        metadata: metadata of the file.

    Raises:
        FileError: a tensor that is not finite, or that `dtype` cannot hold.
        WriteError: the disk is full, or the folder is missing.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    place, kinds = 0, {}
    for name, entry in entries.items():
        floating = entry.dtype.is_floating_point
        kinds[name] = dtype if dtype is not None and floating else entry.dtype
        size = kinds[name].itemsize * int(torch.Size(entry.shape).numel())
        header[name] = {
            "dtype": _NAMES[kinds[name]],
            "shape": list(entry.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    remove_abandoned(path)
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, entry in entries.items():
                for block in _blocks(path, name, entry, kinds[name]):
                    file.write(block)
            file.flush()
            os.fsync(file.fileno())
        with uninterrupted():
            os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(error, path, place, "The previous content is intact") from error
    finally:
        temporary.unlink(missing_ok=True)


def _blocks(path: Path, name: str, entry: Entry, dtype: torch.dtype) -> Iterable[Any]:
    """Iterate over the bytes of one tensor."""
    given = entry.make().detach().cpu()
    assert tuple(given.shape) == tuple(entry.shape), f"{name} is {list(given.shape)}, announced as {list(entry.shape)}"
    value = given.to(dtype).contiguous()
    if first_not_finite({name: value}) is not None:
        if first_not_finite({name: given}) is not None:
            raise FileError(f"{path.name} must hold finite weights, got NaN or infinite numbers in {name}")
        raise FileError(
            f"{name} does not fit {str(dtype).removeprefix('torch.')}: its largest number is {given.abs().max():g}. Try: "
            "--dtype bfloat16"
        )
    if value.numel():
        yield value.view(-1).view(torch.uint8).numpy()
