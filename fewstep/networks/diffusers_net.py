"""Networks of the diffusers library behind fewstep's interface: UNets, and flow and eps transformers.

`FAMILIES` describes how they differ. A new family is an entry there: how the network is called, the output of the pipeline's
`encode_prompt`, and the layer that a GAN head reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from fewstep.networks.base import NetSpec
from fewstep.networks.quantized import Quantization, Quantized, quantize

__all__ = ["FAMILIES", "FLUX_GUIDANCE", "DiffusersNet", "DiffusersSpec", "Family"]

Condition = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """Calling convention of one kind of network of diffusers.

    Attributes:
        component: the network's name in a pipeline.
        call: (network, noisy samples, label, condition) -> raw prediction of the samples' shape.
        encode: (pipeline, prompts, device, further arguments of its `encode_prompt`) -> (conditions of the prompts, of as many
            empty ones), each tensor [count, ...]. The arguments hold `negative_prompt`, as many texts instead of the empty ones,
            where a negative prompt is wanted. None: the network is unconditional.
        constants: (network's configuration, height and width of a picture) -> conditions equal for all samples, each [...].
        bottleneck: configuration -> the layer whose output a GAN head reads.
        own_sigmas: the pipeline's call itself passes its scheduler the noise levels 1, 1 - 1/K, ..., 1/K of K steps.
        guided_inside: guidance is an input of the network, so `objective.guidance` is an error.
        shapes: (configuration, tokens that T5 or Gemma reads) -> the shapes of what `encode` gives for one prompt, for `fewstep
            plan`; None: the usual number.
    """

    component: Literal["unet", "transformer"]
    call: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    encode: Callable[[Any, list[str], Any, dict[str, Any]], tuple[Condition, Condition]] | None
    constants: Callable[[Mapping[str, Any], tuple[int, int]], Condition] = lambda config, size: {}
    bottleneck: Callable[[Mapping[str, Any]], str] = lambda config: f"transformer_blocks.{config['num_layers'] // 2}"
    guided_inside: Callable[[Mapping[str, Any]], bool] = lambda config: False
    shapes: Callable[[Mapping[str, Any], int | None], dict[str, tuple[int, ...]]] = lambda config, tokens: {}
    own_sigmas: bool = False


# -- UNets: Stable Diffusion 1.5, 2.1, SDXL ------------------------------------------------------------------------------


def _call_unet(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    added = None
    if "pooled" in cond:
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    return model(x, label, encoder_hidden_states=cond["text"], added_cond_kwargs=added, return_dict=False)[0]


def _encode_clip(pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]) -> tuple[Condition, Condition]:
    found = pipeline.encode_prompt(
        prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True, **more
    )
    # (text, negative text), and with pooled embeddings (text, negative text, pooled, negative pooled)
    names = ("text", "pooled") if len(found) == 4 else ("text",)
    return dict(zip(names, found[0::2], strict=True)), dict(zip(names, found[1::2], strict=True))


def _unet_shapes(config: Mapping[str, Any], tokens: int | None) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"text": (77, config["cross_attention_dim"])}
    if config.get("addition_embed_type") == "text_time":
        shapes["pooled"] = (config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"],)
    return shapes


def _time_ids(config: Mapping[str, Any], size: tuple[int, int]) -> Condition:
    """SDXL's micro-conditions: original size, crop, target size, each height before width (Podell et al. 2023, section 2.2)."""
    if config.get("addition_embed_type") != "text_time":
        return {}
    return {"time_ids": torch.tensor([*size, 0.0, 0.0, *size], dtype=torch.float32)}


def framed_time_ids(frames: Tensor, size: tuple[int, int]) -> Condition:
    """The same for pictures that were resized and cropped to `size` [B, 6].

    Args:
        frames: height and width that they had, rows and columns cut off at their top and left after resizing [B, 4].
        size: height and width that they have.
    """
    return {"time_ids": torch.cat([frames.float(), frames.new_tensor(size).float().expand(len(frames), 2)], 1)}


# -- unconditional UNets on pixels: DDPMPipeline --------------------------------------------------------------------------


def _call_ddpm(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    return model(x, label, return_dict=False)[0][:, : x.shape[1]]  # the other half is the learnt variance, if any


# -- Stable Diffusion 3 --------------------------------------------------------------------------------------------------


def _call_sd3(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    text, pooled = cond["text"], cond["pooled"]
    return model(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=label, return_dict=False)[0]


def _encode_sd3(pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]) -> tuple[Condition, Condition]:
    found = pipeline.encode_prompt(prompts, prompts, prompts, device=device, do_classifier_free_guidance=True, **more)
    return {"text": found[0], "pooled": found[2]}, {"text": found[1], "pooled": found[3]}


def _sd3_shapes(config: Mapping[str, Any], tokens: int | None) -> dict[str, tuple[int, ...]]:
    """77 tokens of CLIP and 256 of T5."""
    return {"text": (77 + (tokens or 256), config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}


# -- FLUX ----------------------------------------------------------------------------------------------------------------


def _call_flux(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    """Call FLUX: a token is 2 x 2 latents, numbered by row and column; all text tokens are at the origin."""
    count, channels, height, width = x.shape
    rows, columns = height // 2, width // 2
    tokens = (
        x.reshape(count, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(count, rows * columns, -1)
    )
    places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    places[..., 1], places[..., 2] = torch.arange(rows)[:, None].to(x), torch.arange(columns)[None].to(x)
    text = cond["text"]
    output = model(
        hidden_states=tokens, timestep=label / 1000, guidance=cond.get("guidance"), pooled_projections=cond["pooled"],
        encoder_hidden_states=text, txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=x.dtype),
        img_ids=places.reshape(-1, 3), return_dict=False,
    )[0]  # fmt: skip
    output = output.reshape(count, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return output.reshape(count, channels, height, width)


def _encode_flux(pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]) -> tuple[Condition, Condition]:
    more = dict(more)
    negative = more.pop("negative_prompt", [""] * len(prompts))
    text, pooled, _ = pipeline.encode_prompt(prompts, device=device, **more)
    empty, empty_pooled, _ = pipeline.encode_prompt(negative, device=device, **more)
    return {"text": text, "pooled": pooled}, {"text": empty, "pooled": empty_pooled}


FLUX_GUIDANCE = 3.5  # its pipeline's default


def _flux_guidance(config: Mapping[str, Any], size: tuple[int, int]) -> Condition:
    """Guidance input of FLUX.1-dev, which was distilled under guidance."""
    return {"guidance": torch.tensor(FLUX_GUIDANCE)} if config.get("guidance_embeds") else {}


def _flux_shapes(config: Mapping[str, Any], tokens: int | None) -> dict[str, tuple[int, ...]]:
    return {"text": (tokens or 512, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}


# -- SANA, PixArt: attention masks for the text --------------------------------------------------------------------------


def _call_sana(model: Any, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    label = label * model.config.timestep_scale
    text, mask = cond["text"], cond["mask"]
    return model(x, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=label, return_dict=False)[0]


def _call_pixart(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    sizes: dict[str, Any] = {"resolution": cond.get("resolution"), "aspect_ratio": cond.get("aspect_ratio")}
    output = model(
        x, encoder_hidden_states=cond["text"], encoder_attention_mask=cond["mask"], timestep=label, added_cond_kwargs=sizes,
        return_dict=False,
    )[0]  # fmt: skip
    return output[:, : x.shape[1]]  # the other half is the learnt variance, if any


def _encode_masked(pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]) -> tuple[Condition, Condition]:
    found = pipeline.encode_prompt(prompts, do_classifier_free_guidance=True, device=device, **more)
    text, mask, empty, empty_mask = found
    return {"text": text, "mask": mask}, {"text": empty, "mask": empty_mask}


def _pixart_sizes(config: Mapping[str, Any], size: tuple[int, int]) -> Condition:
    if config["sample_size"] != 128:  # only the 1024-pixel model takes the size as an input (PixArt-alpha)
        return {}
    height, width = size
    return {"resolution": torch.tensor(size, dtype=torch.float32), "aspect_ratio": torch.tensor([height / width])}


def _masked_shapes(config: Mapping[str, Any], tokens: int | None) -> dict[str, tuple[int, ...]]:
    tokens = tokens or 300
    return {"text": (tokens, config["caption_channels"]), "mask": (tokens,)}


FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family("unet", _call_ddpm, None, bottleneck=lambda config: "mid_block"),
    "UNet2DConditionModel": Family(
        "unet", _call_unet, _encode_clip, _time_ids, lambda config: "mid_block", shapes=_unet_shapes
    ),
    "SD3Transformer2DModel": Family(
        "transformer", _call_sd3, _encode_sd3, bottleneck=lambda config: f"transformer_blocks.{config['num_layers'] // 2}.ff",
        shapes=_sd3_shapes,
    ),
    "FluxTransformer2DModel": Family(
        "transformer", _call_flux, _encode_flux, _flux_guidance,
        lambda config: f"transformer_blocks.{config['num_layers'] // 2}.ff", lambda config: bool(config.get("guidance_embeds")),
        _flux_shapes, own_sigmas=True,
    ),
    "SanaTransformer2DModel": Family("transformer", _call_sana, _encode_masked, shapes=_masked_shapes),
    "PixArtTransformer2DModel": Family("transformer", _call_pixart, _encode_masked, _pixart_sizes, shapes=_masked_shapes),
}  # fmt: skip


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
            raise ValueError(f"network {value} is not known here: known are {', '.join(FAMILIES)}")
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
