"""Count the operations inside a context, and the bytes of its tensors. Knows no network."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["Counter", "Memory", "Peak"]

aten = torch.ops.aten
META = torch.device("meta")
Made = tuple[torch.Size, tuple[int, ...], torch.dtype] | None  # size, strides and type of a result


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _formulas() -> dict[Any, Callable[..., int]]:
    """PyTorch's formulas, but with fused attention counted as explicit attention on every device: 2 products, 4 in the backward.

    A fused backward recomputes the scores, which PyTorch counts for GPU kernels but not for the CPU's.
    """
    found = dict(flop_registry)
    for kind in ("flash", "efficient", "cudnn", "fused"):
        for suffix in ("attention", "attention_for_cpu", "attention_overrideable"):
            name = f"_scaled_dot_product_{kind}_{suffix}"
            if hasattr(aten, name):  # the kernels depend on PyTorch's version
                found[getattr(aten, name)] = lambda q, k, v, *_, **__: _attention(q, k, v)
                found[getattr(aten, f"{name}_backward")] = lambda grad, q, k, v, *_, **__: 2 * _attention(q, k, v)
    return found


class Counter(TorchDispatchMode):
    """Sums multiplications and additions of products and convolutions, as PyTorch counts them.

    On the meta device, results of an operation with the same input sizes are cached: many shape functions take longer than
    the operation itself would on a GPU. Reading a value, which meta tensors lack, gives 1.

    Args:
        memory: records every new tensor; None: bytes are not counted.

    Attributes:
        operations: operations so far.
    """

    def __init__(self, memory: Memory | None = None) -> None:
        super().__init__()
        self.memory, self.operations = memory, 0
        self._formulas = _formulas()
        self._seen: dict[Any, tuple[int, list[Made], bool]] = {}
        self._pure: dict[OpOverload, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].new_ones((), device="cpu").item()
        if (pure := self._pure.get(func)) is None:
            pure = self._pure[func] = not (func._schema.is_mutable or any(r.alias_info for r in func._schema.returns))
        key = (func, _signature(args), *kwargs, _signature((*kwargs.values(),))) if pure else None
        try:
            seen = self._seen.get(key)
        except TypeError:  # an argument that cannot be hashed, such as a random generator
            seen = key = None
        if seen is not None:
            count, made, single = seen
            results = [None if m is None else torch.empty_strided(m[0], m[1], dtype=m[2], device=META) for m in made]
            found = results[0] if single else tuple(results)
        else:
            found = func(*args, **kwargs)
            formula = self._formulas.get(func._overloadpacket)
            count = 0 if formula is None else formula(*args, **kwargs, out_val=found)
            single = isinstance(found, Tensor)
            results = [found] if single else list(found) if isinstance(found, (tuple, list)) else []
            if key is not None and type(found) is not list and _new_on_meta(results, args):
                shapes = [None if r is None else (r.shape, r.stride(), r.dtype) for r in results]
                self._seen[key] = (count, shapes, single)
        self.operations += count
        if self.memory is not None:
            for result in results:
                if isinstance(result, Tensor):
                    self.memory.add(result)
        return found


def _signature(value: Any) -> Any:
    """Parts of an argument that determine the sizes of an operation's results. Called for every argument, common cases first."""
    kind = type(value)
    if kind is Tensor or kind is torch.nn.Parameter:
        return value.shape, value.stride(), value.dtype, value.is_meta
    if kind is tuple or kind is list:
        return tuple([_signature(part) for part in value])
    return kind, value  # 1, 1.0 and True give different tensors


def _new_on_meta(results: Sequence[Any], args: Any) -> bool:
    """Return whether all results are meta tensors and not views of an input (which not every schema states)."""
    if not results or not all(r is None or (isinstance(r, Tensor) and r.is_meta) for r in results):
        return False
    given = {value.untyped_storage()._cdata for value in args if isinstance(value, Tensor)}
    return not any(r is not None and r.untyped_storage()._cdata in given for r in results)


@dataclass(frozen=True)
class Peak:
    """Bytes at the memory peak: gradients, lower-precision copies of weights, and the rest.

    Attributes:
        alone: peak bytes of the rest alone, at any time.
    """

    gradients: int = 0
    copies: int = 0
    rest: int = 0
    alone: int = 0

    @property
    def size(self) -> int:
        """All together."""
        return self.gradients + self.copies + self.rest


class Memory:
    """Bytes of live tensors, without the workspaces of kernels; each storage counts once.

    Args:
        known: existing tensors, such as weights, which are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {
            value.untyped_storage()._cdata: value for value in known
        }  # kept alive, so that their addresses are not reused
        self._storages: dict[int, tuple[Any, str, int]] = {}
        self._held = {"gradients": 0, "copies": 0, "rest": 0}
        self._kind = "rest"
        self.reset()

    def reset(self) -> None:
        """Start a new peak."""
        self._most, self._alone = sum(self._held.values()), self._held["rest"]
        self._peak = (self._held["gradients"], self._held["copies"], self._held["rest"])

    def take(self) -> Peak:
        """Return the peak since the last `reset`, and reset."""
        found = Peak(*self._peak, self._alone)
        self.reset()
        return found

    def owns(self, value: Tensor) -> bool:
        """Return whether a tensor or its base is among the known tensors."""
        return value.untyped_storage()._cdata in self._known

    def add(self, value: Tensor) -> None:
        """Count a tensor, unless its storage is already counted."""
        storage = value.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._storages or address in self._known:
            return

        def freed(_: Any) -> None:
            _, kind, size = self._storages.pop(address)
            self._held[kind] -= size

        self._storages[address] = (weakref.ref(storage, freed), self._kind, size)
        held = self._held
        held[self._kind] += size
        if held["rest"] > self._alone:
            self._alone = held["rest"]
        if (total := held["gradients"] + held["copies"] + held["rest"]) > self._most:
            self._most, self._peak = total, (held["gradients"], held["copies"], held["rest"])

    def gradient(self, value: Tensor) -> None:
        """Mark a counted tensor as the gradient of a weight."""
        address = value.untyped_storage()._cdata
        if address in self._storages:
            reference, kind, size = self._storages[address]
            self._storages[address] = (reference, "gradients", size)
            self._held[kind] -= size
            self._held["gradients"] += size

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Count tensors made inside as copies of weights."""
        self._kind = "copies"
        try:
            yield
        finally:
            self._kind = "rest"
