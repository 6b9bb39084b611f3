"""Run an update on the meta device as on a GPU: with fused attention, and with autocast, which the meta device lacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.fx.experimental._config as meta_kernels
import torch.nn.functional as F
from torch import Tensor
from torch.amp.autocast_mode import autocast

from fewstep.costs.counting import Memory

__all__ = ["as_on_a_gpu"]

# Operations that CUDA's autocast runs in bfloat16, and those that it runs in float32 (the ones whose results are large):
# https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior
NARROW = {
    F: ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    torch: ("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv2d"),
    Tensor: ("matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__", "__rmatmul__"),
}
WIDE = {
    F: ("layer_norm", "group_norm", "softmax", "log_softmax", "mse_loss"),
    torch: ("layer_norm", "group_norm", "softmax", "log_softmax"),
    Tensor: ("softmax", "log_softmax"),
}


@contextmanager
def as_on_a_gpu(memory: Memory | None = None) -> Iterator[None]:
    """Make `torch.autocast` follow CUDA's rules on the meta device, and attention keep what the fused kernels keep.

    Args:
        memory: records which tensors are copies of weights, if given.
    """
    casts = _Casts(memory)

    class Autocast(autocast):
        """Uses the CPU's autocast state, which does not affect meta tensors and which checkpointing restores."""

        def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
            super().__init__("cpu" if device_type == "meta" else device_type, *args, **options)

        def __enter__(self) -> Any:
            casts.depth += 1
            return super().__enter__()

        def __exit__(self, *error: Any) -> Any:
            casts.depth -= 1
            if not casts.depth:
                casts.forget()
            return super().__exit__(*error)

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        if not query.is_meta:
            return fused(query, key, value, *args, **options)
        return _attention(*casts.narrow((query, key, value)), *args, **options)

    fused = F.scaled_dot_product_attention
    with ExitStack() as patches:
        # the number of selected entries of a mask is a value, which meta tensors lack: assume all
        patches.enter_context(mock.patch.object(meta_kernels, "meta_nonzero_assume_all_nonzero", True))
        for table, cast in ((NARROW, casts.narrow), (WIDE, casts.wide)):
            for owner, names in table.items():
                for name in names:
                    patches.enter_context(mock.patch.object(owner, name, _cast_first(getattr(owner, name), cast)))
        patches.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        patches.enter_context(mock.patch.object(torch, "autocast", Autocast))
        patches.enter_context(mock.patch.object(torch.amp, "autocast", Autocast))
        for owner, name in (
            (torch, "is_autocast_enabled"),
            (torch, "get_autocast_dtype"),
            (torch.amp, "is_autocast_available"),
        ):
            patches.enter_context(mock.patch.object(owner, name, _of_the_cpu(getattr(owner, name))))
        patches.enter_context(mock.patch.object(torch, "clear_autocast_cache", casts.forget))
        yield


def _of_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *devices: function(*("cpu" if device == "meta" else device for device in devices))


def _cast_first(function: Callable[..., Any], cast: Callable[[Any], Any]) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args, options = cast(args), {name: cast(value) for name, value in options.items()}
        return function(*args, **options)

    return run


class _Casts:
    """Casts of autocast; copies of trained weights are kept until the outermost context ends."""

    def __init__(self, memory: Memory | None) -> None:
        self.memory, self.depth = memory, 0
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    def forget(self) -> None:
        self.copies.clear()

    def narrow(self, value: Any) -> Any:
        """Cast float32 tensors to bfloat16, also within tuples and lists."""
        if isinstance(value, tuple | list):
            return type(value)(map(self.narrow, value))
        if not (isinstance(value, Tensor) and value.is_meta and value.dtype == torch.float32):
            return value
        if not torch.is_autocast_enabled("cpu"):
            return value
        kept = value.is_leaf and value.requires_grad and torch.is_grad_enabled()
        if kept and id(value) in self.copies:
            return self.copies[id(value)][1]
        if self.memory is not None and self.memory.owns(value):
            with self.memory.copying():
                copy = value.bfloat16()
        else:
            copy = value.bfloat16()
        if kept:
            self.copies[id(value)] = (value, copy)
        return copy

    def wide(self, value: Any) -> Any:
        """Cast bfloat16 tensors to float32, also within tuples and lists."""
        if isinstance(value, tuple | list):
            return type(value)(map(self.wide, value))
        return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention as one operation; PyTorch would expand it on the meta device and keep all scores."""
    if query.ndim != 4:  # a kernel takes [batch, heads, tokens, width]
        lead, key, value = query.shape[:-2], key.flatten(0, -3)[:, None], value.flatten(0, -3)[:, None]
        if attn_mask is not None and attn_mask.ndim > 2:
            attn_mask = attn_mask.expand(*lead, *attn_mask.shape[-2:]).flatten(0, -3)[:, None]
        query = query.flatten(0, -3)[:, None]
        flat = _attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return flat.squeeze(1).unflatten(0, lead)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    if attn_mask is not None:
        bias = attn_mask if attn_mask.is_floating_point() else torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = bias.expand(*query.shape[:-1], key.shape[-2])
    keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale
    )
    attended: Tensor = found[0]
    return attended
