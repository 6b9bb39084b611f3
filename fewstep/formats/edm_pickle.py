"""Reader of EDM's and SiD's pickled networks as data: nothing in the file is ever executed. Knows no network of fewstep.

The published loader runs Python source that is embedded in the file. This reader decodes the pickle with a table that maps
the names in such files to inert records, and refuses any other name. The result is the constructor's arguments and the
tensors by name.

Layout (Karras et al. 2022, NVIDIA's persistence format): a dict with "ema", a call of `_reconstruct_persistent_obj`
with {"class_name", "module_src", "state"}; `state` is the module's `__dict__`; tensors are legacy `torch.save` streams.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fewstep.system.data_pickle import DAMAGE, DataUnpickler, Record, Table
from fewstep.system.errors import FileError

__all__ = ["PickledModule", "read_edm_pickle"]

MOST_TENSORS, MOST_DEPTH = 20_000, 40  # the largest published network has 1,500 tensors, six modules deep
MOST_BYTES = 4 << 30  # and 1.2 GB
PLAIN = (bool, int, float, str, type(None))


@dataclass
class PickledModule:
    """A module as described by the file.

    Attributes:
        class_name: class in the published program.
        arguments: the constructor's keyword arguments, plain values only.
        tensors: parameters and buffers by name, float32 or as stored.
        left_out: names of the arguments that are not plain values.
    """

    class_name: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()


def read_edm_pickle(path: Path, key: str = "ema") -> PickledModule:
    """Read the network under `key` ("ema" in all published files).

    Raises:
        FileError: the file is truncated, has wrong sizes, refers to unknown names, or has another layout.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    if path.stat().st_size > MOST_BYTES:
        raise FileError(f"{path} has {path.stat().st_size:,} bytes, more than any EDM network (at most {MOST_BYTES:,})")
    content = path.read_bytes()
    try:
        root = _Reader(io.BytesIO(content)).load()
        if not isinstance(root, dict) or key not in root:
            holds = ", ".join(map(repr, list(root)[:8])) if isinstance(root, dict) else type(root).__name__
            raise FileError(f"there is no {key!r} in it, but {holds or 'nothing'}")
        top = root[key]
        if not isinstance(top, _Persistent):
            raise FileError(f"{key!r} holds a {type(top).__name__}, not a network")
        given = top.arguments()
        plain = {name: value for name, value in given.items() if _is_plain(value)}
        found = PickledModule(top.text("class_name"), plain, left_out=frozenset(given.keys() - plain.keys()))
        for name, tensor in _tensors(top, "", 0):
            if len(found.tensors) == MOST_TENSORS:
                raise FileError(f"more than {MOST_TENSORS:,} tensors")
            found.tensors[name] = tensor
    except FileError as error:
        raise FileError(f"{path} is not an EDM network that fewstep can read: {error}") from None
    except DAMAGE as error:
        why = str(error) or type(error).__name__
        raise FileError(f"{path} is damaged, or no pickle: {why}; fetch it again and compare its checksum") from None
    if not found.tensors:
        raise FileError(f"{path} is not an EDM network that fewstep can read: it holds no tensors")
    return found


# -- inert records for a file's names --------------------------------------------------------------------------


class _Persistent(Record):
    """A module of the published programs: `_reconstruct_persistent_obj(meta)`. Its source is ignored."""

    def text(self, name: str) -> str:
        value = self.meta().get(name)
        if not isinstance(value, str):
            raise FileError(f"a module's {name} is missing")
        return value

    def meta(self) -> dict[str, Any]:
        if len(self.made_from) != 1 or not isinstance(self.made_from[0], dict):
            raise FileError("a module without its description")
        return self.made_from[0]

    def own_state(self) -> Any:
        return self.meta().get("state")

    def arguments(self) -> dict[str, Any]:
        """The constructor's keyword arguments."""
        state = self.own_state()
        values = state.get("_init_kwargs") if isinstance(state, dict) else None
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise FileError("the constructor's arguments (_init_kwargs) are missing")
        if state.get("_init_args"):
            raise FileError("arguments without a name (_init_args) are not known here")
        return values


class _Container(Record):
    """torch.nn.ModuleDict."""

    def own_state(self) -> Any:
        return self.state


class _Storage(Record):
    """torch.storage._load_from_bytes(blob)."""


class _Strided(Record):
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)."""


class _Parameter(Record):
    """torch._utils._rebuild_parameter(tensor, requires_grad, hooks)."""


class _Ignored(Record):
    """A numpy scalar or dtype, which no supported network needs."""


_NAMES: dict[tuple[str, str], Any] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Persistent,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _Strided,
    ("torch.storage", "_load_from_bytes"): _Storage,
    ("collections", "OrderedDict"): Table,
    ("torch.nn.modules.container", "ModuleDict"): _Container,
    ("dnnlib.util", "EasyDict"): Table,
    **{
        (f"numpy.{core}.multiarray", name): _Ignored
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    },
    ("numpy", "dtype"): _Ignored,
    ("numpy", "ndarray"): _Ignored,
}


_DTYPES = {
    "FloatStorage": "<f4", "HalfStorage": "<f2", "DoubleStorage": "<f8", "LongStorage": "<i8", "IntStorage": "<i4",
    "ByteStorage": "|u1", "BoolStorage": "|b1",
}  # fmt: skip


class _Reader(DataUnpickler):
    """Reads the file's own pickle."""

    names = _NAMES
    what = "an EDM network"


class _StorageReader(DataUnpickler):
    """Reads the pickles inside a tensor's stream: one storage, described by a persistent id."""

    names: ClassVar[Mapping[tuple[str, str], Any]] = {("torch", name): name for name in _DTYPES}
    what = "a tensor"
    described: Any = None

    def persistent_load(self, pid: Any) -> Any:
        self.described = pid
        return pid


LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


# -- from records to tensors -------------------------------------------------------------------------------------------


def _tensors(module: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Iterate over (name, tensor) of a module's parameters and buffers, and of its sub-modules."""
    if depth > MOST_DEPTH:
        raise FileError(f"modules nested deeper than {MOST_DEPTH}")
    if not isinstance(module, _Persistent | _Container):
        raise FileError(f"{prefix or 'the network'} is a {type(module).__name__}, not a module")
    state = module.own_state()
    if not isinstance(state, dict):
        raise FileError(f"{prefix or 'the network'} has no state")
    for kind in ("_parameters", "_buffers"):
        for name, value in _named(state, kind):
            if value is not None:
                yield prefix + name, _tensor(value, prefix + name)
    for name, value in _named(state, "_modules"):
        if value is not None:
            yield from _tensors(value, f"{prefix}{name}.", depth + 1)


def _named(state: dict[Any, Any], kind: str) -> list[tuple[str, Any]]:
    values = state.get(kind, {})
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise FileError(f"{kind} is not a table of names")
    return list(values.items())


def _tensor(record: Any, name: str) -> Tensor:
    """Build the tensor that a record describes, from a copy of its bytes."""
    if isinstance(record, _Parameter) and record.made_from:
        record = record.made_from[0]
    if not isinstance(record, _Strided) or len(record.made_from) < 4:
        raise FileError(f"{name} is a {type(record).__name__}, not a tensor")
    storage, offset, size, stride = record.made_from[:4]
    if not isinstance(storage, _Storage) or len(storage.made_from) != 1 or not isinstance(storage.made_from[0], bytes):
        raise FileError(f"{name} has no bytes")
    values = _values(storage.made_from[0], name)
    dimensions = (offset, *size, *stride)
    if (
        len(size) != len(stride)
        or len(size) > 8
        or not all(type(n) is int and 0 <= n <= len(values) for n in dimensions)
    ):
        raise FileError(f"{name} claims a size, stride or offset beyond its {len(values):,} numbers")
    count = int(np.prod(size, dtype=object)) if size else 1
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > len(values) or (count and last >= len(values)):
        raise FileError(f"{name} claims {count:,} numbers that reach to {last:,} of {len(values):,}")
    return torch.from_numpy(values.copy()).as_strided(size, stride, offset).clone()


def _values(blob: bytes, name: str) -> np.ndarray[Any, Any]:
    """Read the values of a legacy `torch.save` stream of one storage; every size is checked against the bytes present."""
    stream = io.BytesIO(blob)
    magic, version = (_StorageReader(stream).load() for _ in range(2))
    if (magic, version) != (LEGACY_MAGIC, LEGACY_VERSION):
        raise FileError(f"{name} is not stored as a legacy torch file")
    _StorageReader(stream).load()  # byte order and sizes of the machine that wrote it: always little-endian here
    reader = _StorageReader(stream)
    reader.load()
    keys = _StorageReader(stream).load()
    described = reader.described
    if not (isinstance(described, tuple) and len(described) >= 5 and described[0] == "storage" and len(keys) == 1):
        raise FileError(f"{name} is not one storage")
    kind, claimed = described[1], described[4]
    if type(kind) is not str or type(claimed) is not int:
        raise FileError(f"{name} does not say what it holds")
    (stored,) = struct.unpack("<q", stream.read(8))
    dtype = np.dtype(_DTYPES[kind])
    rest = len(blob) - stream.tell()
    if stored != claimed or stored < 0 or stored * dtype.itemsize != rest:
        raise FileError(f"{name} claims {claimed:,} numbers and has {rest:,} bytes")
    return np.frombuffer(blob, dtype, count=stored, offset=stream.tell())


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) < 100 and all(isinstance(item, PLAIN) for item in value)
    return isinstance(value, PLAIN)
