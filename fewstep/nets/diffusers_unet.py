"""UNets of the diffusers library as they are (Stable Diffusion 1.5 and 2.1, SDXL, fine-tunes), behind our own call."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

__all__ = ["DiffusersUNet", "DiffusersUNetSpec"]


class DiffusersUNetSpec(BaseModel):
    """A `UNet2DConditionModel`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["diffusers-unet"] = "diffusers-unet"
    config: dict[str, Any]
    """What diffusers stores in its config.json."""
    height: int = Field(gt=0)
    """Height of a sample: of the latent image, or of the picture if there is no VAE."""
    width: int = Field(gt=0)
    """Its width."""

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""
        return self.config["in_channels"], self.height, self.width

    @property
    def bottleneck(self) -> str:
        """The layer that a GAN head reads, as in DMD2."""
        return "model.mid_block"

    def build(self) -> DiffusersUNet:
        """The network, freshly initialised.

        Raises:
            ImportError: diffusers is not installed.
        """
        return DiffusersUNet(self)


class DiffusersUNet(nn.Module):
    """The UNet under the name `model`; `forward(x, label, text, pooled, time_ids)` gives its raw prediction."""

    def __init__(self, spec: DiffusersUNetSpec) -> None:
        from diffusers import UNet2DConditionModel

        super().__init__()
        self.model = UNet2DConditionModel.from_config(dict(spec.config))

    def forward(
        self, x: Tensor, label: Tensor, text: Tensor, pooled: Tensor | None = None, time_ids: Tensor | None = None
    ) -> Tensor:
        """Run the network.

        Args:
            x: noisy samples [B, C, H, W].
            label: timesteps [B].
            text: hidden states of the text encoders [B, N, D].
            pooled: pooled text embeddings [B, P], for SDXL.
            time_ids: original size, crop and target size [B, 6], for SDXL.

        Returns:
            [B, C, H, W], in the dtype of the weights.
        """
        dtype = self.model.dtype
        # frozen weights may be bf16: they are then computed with as they are, autocast would convert back and forth
        casts = dtype != torch.float32 and not x.is_meta  # the meta device knows no autocast
        frozen = torch.autocast(x.device.type, enabled=False) if casts else nullcontext()
        added = None
        if pooled is not None:
            added = {"text_embeds": pooled.to(dtype), "time_ids": time_ids.to(dtype)}
        with frozen:
            return self.model(
                x.to(dtype), label, encoder_hidden_states=text.to(dtype), added_cond_kwargs=added, return_dict=False
            )[0]
