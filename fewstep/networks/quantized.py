"""Frozen weights in 8 or 4 bits: linear layers and convolutions that dequantise their weights on use.

int8 and float8 are PyTorch's own types with one scale per row, NF4 is bitsandbytes'. A layer keeps its class, so adapters
find it. Its gradient with respect to the input equals that of a layer with the dequantised weights, which are recomputed in the
backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from fewstep.networks.blocks import blocks_of
from fewstep.system.errors import SettingsError

__all__ = [
    "WHOLE",
    "Quantization",
    "Quantized",
    "check_library",
    "is_quantized",
    "parameter_count",
    "quantizable",
    "quantize",
    "rounded",
]

Quantization = Literal["int8", "float8", "nf4"]

GROUP = 64  # weights per scale in NF4 (Dettmers et al. 2023, arXiv 2305.14314, section 3)
WHOLE = (
    "teacher.quantize must be null where whole weights are trained, got {kind} {whose}. Try: generator.lora and critic.lora, "
    "adapters on the quantised network"
)
LARGEST = {"int8": 127.5, "float8": torch.finfo(torch.float8_e4m3fn).max}  # as torchao has it


@dataclass(frozen=True)
class Quantized:
    """Result of `quantize`.

    Attributes:
        kind: quantisation type.
        layers: number of quantised layers.
        left: number of other linear layers and convolutions.
        before, after: bytes of the whole network.
    """

    kind: Quantization
    layers: int
    left: int
    before: int
    after: int

    def __str__(self) -> str:
        gib = 2.0**30
        return (
            f"teacher.quantize {self.kind}: {self.layers} linear layers and convolutions in blocks have {self.kind} weights; "
            f"{self.left} outside of blocks (embeddings, first and last layers), norms and biases stay as they are: "
            f"{self.before / gib:.3g} GiB become {self.after / gib:.3g}"
        )


def check_library(kind: Quantization) -> None:
    """Refuse a quantisation type whose library is not installed.

    Raises:
        SettingsError: NF4 without bitsandbytes.
    """
    if kind == "nf4":
        _bitsandbytes()


def quantize(network: nn.Module, kind: Quantization) -> Quantized:
    """Quantise a frozen network's weights in place, irreversibly.

    Applies to linear layers and convolutions without groups inside blocks (`blocks_of`): nearly all weights of transformers,
    most of a UNet. There is one scale per row (output channel), in NF4 per 64 weights.

    Args:
        network: the network, in its compute dtype.
        kind: quantisation type.

    Raises:
        SettingsError: the network has no such layers, or NF4's library is not installed.
    """
    check_library(kind)
    before = _bytes(network)
    fit, chosen = _fit(network), quantizable(network)
    if not chosen:
        raise SettingsError(
            f"teacher.quantize must find linear layers in blocks, got {type(network).__name__}, which has none. Try: leave it out"
        )
    for layer in chosen:
        _pack(layer, kind)
    return Quantized(kind, len(chosen), len(fit) - len(chosen), before, _bytes(network))


def quantizable(network: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """Find the layers in blocks whose weights `quantize` would change."""
    inside = {part for block in blocks_of(network) for part in block.modules()}
    return [part for part in _fit(network) if part in inside]


def rounded(weight: Tensor, way: Literal["int8", "float8", "cast"]) -> Tensor:
    """Round a weight as `quantize` does, or by a plain cast to float8 without a scale; same shape and dtype."""
    if way == "cast":
        return weight.to(torch.float8_e4m3fn).to(weight.dtype)
    codes, scale = _codes(weight.flatten(1), way)
    return _widened(codes, scale, way, weight.shape, weight.dtype)


def is_quantized(network: nn.Module) -> bool:
    """Return whether a network has quantised layers."""
    return any(isinstance(part, _Layer) for part in network.modules())


def parameter_count(network: nn.Module) -> int:
    """Number of weights of a network, quantised or not, without counting codes and scales."""
    packed = [part for part in network.modules() if isinstance(part, _Layer)]
    codes = {value for layer in packed for value in (layer.codes, layer.scale)}
    return sum(math.prod(layer.size) for layer in packed) + sum(
        value.numel() for value in network.parameters() if value not in codes
    )


def _bytes(network: nn.Module) -> int:
    return sum(value.nbytes for value in network.parameters())


def _fit(network: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    fit = (part for part in network.modules() if isinstance(part, nn.Linear | nn.Conv2d) and type(part) in _QUANTIZED)
    return [part for part in fit if isinstance(part, nn.Linear) or (part.groups == 1 and part.padding_mode == "zeros")]


class _Layer(nn.Module):
    """A layer whose weight is `codes` and `scale`.

    Attributes:
        codes: int8 or float8 [rows, columns]; in NF4 two per byte.
        scale: [rows, 1], in NF4 one per `GROUP` weights; float32.
        kind: quantisation type.
        size: shape of the weight.
        dtype: dtype of the original weight.
    """

    codes: nn.Parameter
    scale: nn.Parameter
    kind: Quantization
    size: torch.Size
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """Dequantised weight: a new tensor at each access."""
        return _widened(self.codes, self.scale, self.kind, self.size, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output for `x`, in its dtype, or autocast's."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        output: Tensor = _Product.apply(x, self.codes, self.scale, self)
        return output


class _Linear(_Layer, nn.Linear): ...  # type: ignore[override]  # a weight that cannot be set


class _Conv2d(_Layer, nn.Conv2d): ...  # type: ignore[override]


_QUANTIZED: dict[type[nn.Module], type[_Layer]] = {nn.Linear: _Linear, nn.Conv2d: _Conv2d}


class _Product(torch.autograd.Function):
    """Product of an input and a packed weight, which is dequantised for it and again for the input's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(codes, scale)  # as they were then: a block may be back at the host by the backward pass
        ctx.layer, ctx.size = layer, x.shape
        weight = _widened(codes, scale, layer.kind, layer.size, x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (gradient,), layer = gradients, ctx.layer
        codes, scale = ctx.saved_tensors
        weight = _widened(codes, scale, layer.kind, layer.size, gradient.dtype)
        if isinstance(layer, nn.Conv2d):
            return (
                conv2d_input(ctx.size, weight, gradient, layer.stride, layer.padding, layer.dilation),
                None, None, None,
            )  # fmt: skip
        return gradient @ weight, None, None, None


@torch.no_grad()
def _pack(layer: nn.Linear | nn.Conv2d, kind: Quantization) -> None:
    """Replace a layer's weight by codes and scales; the layer object and its hooks stay the same."""
    weight = layer.weight.detach()
    del layer._parameters["weight"]
    layer.__class__ = cast(Any, _QUANTIZED[type(layer)])
    packed = cast(Any, layer)
    packed.kind, packed.size, packed.dtype = kind, weight.shape, weight.dtype
    for name, value in zip(("codes", "scale"), _codes(weight.flatten(1), kind), strict=True):
        layer.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _codes(rows: Tensor, kind: Quantization) -> tuple[Tensor, Tensor]:
    if kind == "nf4":
        codes, state = _bitsandbytes().quantize_4bit(
            rows.contiguous(), blocksize=GROUP, compress_statistics=False, quant_type="nf4"
        )
        return codes, state.absmax
    rows = rows.float()
    scale = (rows.abs().amax(1, keepdim=True) / LARGEST[kind]).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = rows / scale
    if kind == "float8":
        return scaled.to(torch.float8_e4m3fn), scale
    return scaled.round().clamp(-128, 127).to(torch.int8), scale


def _widened(codes: Tensor, scale: Tensor, kind: Quantization, size: torch.Size, dtype: torch.dtype) -> Tensor:
    if kind == "nf4":
        _bitsandbytes()  # registers the operation
        made: Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scale, GROUP, "nf4", list(size), dtype)
        return made
    return codes.to(dtype).mul_(scale).view(size)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError:
        raise SettingsError(
            "`teacher.quantize` must have bitsandbytes for nf4, which is not installed. Try: pip install "
            "'fewstep[nf4]', or int8"
        ) from None
    return bitsandbytes.functional
