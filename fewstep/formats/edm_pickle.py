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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fewstep.system.bounds import regular_file, shown
from fewstep.system.data_pickle import DAMAGE, DataUnpickler, Record, Table, bytes_of_text
from fewstep.system.errors import FileError

__all__ = ["PickledModule", "read_edm_pickle"]

MOST_TENSORS, MOST_DEPTH = 20_000, 40  # the largest published network has 1,500 tensors, six modules deep
MOST_BYTES = 4 << 30  # and 1.2 GB
MOST_COPIES = 2  # tensors may share bytes, but not take more than this many times the file's
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
    path = regular_file(path)
    if path.stat().st_size > MOST_BYTES:
        raise FileError(f"{path} has {path.stat().st_size:,} bytes, more than any EDM network (at most {MOST_BYTES:,})")
    content = path.read_bytes()
    try:
        root = _Reader(io.BytesIO(content)).load()
        if not isinstance(root, dict) or key not in root:
            holds = ", ".join(map(shown, list(root)[:8])) if isinstance(root, dict) else type(root).__name__
            raise FileError(f"there is no {key!r} in it, but {holds or 'nothing'}")
        top = root[key]
        if not isinstance(top, _Persistent):
            raise FileError(f"{key!r} holds a {type(top).__name__}, not a network")
        given = top.arguments()
        plain = {name: value for name, value in given.items() if _is_plain(value)}
        found = PickledModule(top.text("class_name"), plain, left_out=frozenset(given.keys() - plain.keys()))
        found.tensors.update(_Tensors(MOST_COPIES * len(content)).of(top, "the network", 0))
    except FileError as error:
        why = shown(str(error), quote=False)
        raise FileError(f"{path} is not an EDM network that fewstep can read: {why}") from None
    except DAMAGE as error:
        why = shown(str(error) or type(error).__name__, quote=False)
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
    ("_codecs", "encode"): bytes_of_text,  # protocol 2
    ("torch.nn.modules.container", "ModuleDict"): _Container,
    ("dnnlib.util", "EasyDict"): Table,
    **{
        (f"numpy.{core}.multiarray", name): _Ignored
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    },
    ("numpy", "dtype"): _Ignored,
    ("numpy", "ndarray"): _Ignored,
    ("builtins", "set"): _Ignored,  # protocol 3
    ("__builtin__", "set"): _Ignored,  # protocol 2, by the name of Python 2
}


_DTYPES = {
    "FloatStorage": "<f4", "HalfStorage": "<f2", "DoubleStorage": "<f8", "LongStorage": "<i8", "IntStorage": "<i4",
    "ByteStorage": "|u1", "BoolStorage": "|b1", "BFloat16Storage": "<u2",
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


class _Tensors:
    """Parameters and buffers of modules by name. Each record of the file is visited once, however often it is referred to.

    Args:
        most_bytes: of all tensors together.
    """

    def __init__(self, most_bytes: int) -> None:
        self.left = most_bytes
        self._modules: dict[int, dict[str, Tensor]] = {}
        self._tensors: dict[int, Tensor] = {}
        self._values: dict[int, tuple[np.ndarray[Any, Any], str]] = {}

    def of(self, module: Any, where: str, depth: int) -> dict[str, Tensor]:
        """Tensors of a module and its sub-modules."""
        if depth > MOST_DEPTH:
            raise FileError(f"modules nested deeper than {MOST_DEPTH}")
        if not isinstance(module, _Persistent | _Container):
            raise FileError(f"{where} is a {type(module).__name__}, not a module")
        if id(module) in self._modules:
            return self._modules[id(module)]
        state = module.own_state()
        if not isinstance(state, dict):
            raise FileError(f"{where} has no state")
        found: dict[str, Tensor] = {}
        for kind in ("_parameters", "_buffers"):
            found |= {name: self._tensor(value, name) for name, value in _named(state, kind) if value is not None}
        for name, value in _named(state, "_modules"):
            if value is not None:
                inside = self.of(value, name, depth + 1)
                if len(found) + len(inside) > MOST_TENSORS:
                    raise FileError(f"more than {MOST_TENSORS:,} tensors")
                found |= {f"{name}.{inner}": tensor for inner, tensor in inside.items()}
        self._modules[id(module)] = found
        return found

    def _tensor(self, record: Any, name: str) -> Tensor:
        """Build the tensor that a record describes, from a copy of its bytes."""
        if isinstance(record, _Parameter) and record.made_from:
            record = record.made_from[0]
        if id(record) in self._tensors:
            return self._tensors[id(record)]
        if not isinstance(record, _Strided) or len(record.made_from) < 4:
            raise FileError(f"{name} is a {type(record).__name__}, not a tensor")
        storage, offset, size, stride = record.made_from[:4]
        if (
            not isinstance(storage, _Storage)
            or len(storage.made_from) != 1
            or not isinstance(storage.made_from[0], bytes)
        ):
            raise FileError(f"{name} has no bytes")
        blob = storage.made_from[0]
        if id(blob) not in self._values:
            self._values[id(blob)] = _values(blob, name)
        values, kind = self._values[id(blob)]
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
        self.left -= count * values.itemsize
        if self.left < 0:
            raise FileError(f"its tensors have more than {MOST_COPIES} times the bytes of the file")
        steps = tuple(step * values.itemsize for step in stride)
        made = torch.from_numpy(np.lib.stride_tricks.as_strided(values[offset:], size, steps, writeable=False).copy())
        self._tensors[id(record)] = made = made.view(torch.bfloat16) if kind == "BFloat16Storage" else made
        return made


def _named(state: dict[Any, Any], kind: str) -> list[tuple[str, Any]]:
    values = state.get(kind, {})
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise FileError(f"{kind} is not a table of names")
    return list(values.items())


def _values(blob: bytes, name: str) -> tuple[np.ndarray[Any, Any], str]:
    """Read the values, and the kind of storage, of a legacy `torch.save` stream of one storage; every size is checked against the bytes present."""
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
    return np.frombuffer(blob, dtype, count=stored, offset=stream.tell()), kind


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) < 100 and all(isinstance(item, PLAIN) for item in value)
    return isinstance(value, PLAIN)
