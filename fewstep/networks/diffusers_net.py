"""Networks of the diffusers library behind fewstep's interface. `fewstep.networks.families` describes how they differ."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from fewstep.networks.base import NetSpec
from fewstep.networks.families import FAMILIES
from fewstep.networks.quantized import Quantization, Quantized, quantize

__all__ = ["DiffusersNet", "DiffusersSpec"]


class DiffusersSpec(NetSpec):
    """A network of the diffusers library."""

    kind: Literal["diffusers"] = "diffusers"
    model: str = "UNet2DConditionModel"
    """Its class, one of `FAMILIES`."""
    config: dict[str, Any]
    """Content of the network's config.json."""
    height: int = Field(gt=0)
    """Height of a sample: of the latent image, or of the picture if there is no VAE."""
    width: int = Field(gt=0)
    """Its width."""
    channels: int = Field(4, gt=0)
    """Channels of a sample."""

    @field_validator("model")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in FAMILIES:
            raise ValueError(f"must be one of {', '.join(FAMILIES)}, got {value}")
        return value

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""
        return self.channels, self.height, self.width

    @property
    def bottleneck(self) -> str:
        """Layer that a GAN head reads: DMD2's for UNets, the middle block of transformers."""
        return f"model.{FAMILIES[self.model].bottleneck(self.config)}"

    def build(self) -> DiffusersNet:
        """Build the network with newly initialised weights.

        Raises:
            ImportError: diffusers is not installed.
        """
        return DiffusersNet(self)


class DiffusersNet(nn.Module):
    """Wrapper of diffusers' network (attribute `model`); `forward(x, label, **cond)` returns its raw prediction."""

    def __init__(self, spec: DiffusersSpec) -> None:
        import diffusers

        super().__init__()
        self.model = getattr(diffusers, spec.model).from_config(dict(spec.config))
        self.family = FAMILIES[spec.model]
        self.dtype: torch.dtype | None = (
            None  # of the weights, where they do not say so themselves (split or quantised networks)
        )

    def quantize(self, kind: Quantization) -> Quantized:
        """Quantise the frozen weights in place. See `fewstep.networks.quantized.quantize`."""
        self.dtype = self.model.dtype
        return quantize(self.model, kind)

    def forward(self, x: Tensor, label: Tensor, **cond: Tensor) -> Tensor:
        """Run the network.

        Args:
            x: noisy samples [B, C, H, W].
            label: timesteps [B].
            cond: of the family: `text` [B, N, D] and what else there is, each [B, ...].

        Returns:
            [B, C, H, W], in the dtype of the weights.
        """
        dtype = self.dtype or self.model.dtype
        # compute with frozen bf16 weights directly: autocast would convert back and forth
        casts = dtype != torch.float32 and torch.amp.is_autocast_available(x.device.type)  # not on the meta device
        with torch.autocast(x.device.type, enabled=False) if casts else nullcontext():
            # masks and the time keep their dtype
            cond = {name: value.to(dtype) if value.is_floating_point() else value for name, value in cond.items()}
            return self.family.call(self.model, x.to(dtype), label, cond)
