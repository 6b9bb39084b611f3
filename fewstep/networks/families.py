"""Families of diffusers' networks: how each is called, encodes its prompts, and lays out its samples.

`FAMILIES` is the one place that knows how they differ; a new one is an entry there. Tokens and their places come from the
pipelines' own static methods where they have them. Signs, times and masks are fixed in the loop of a pipeline's call, and
a student is built without a pipeline: tests/teachers/test_families.py compares each with what that call passes on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "FLUX_GUIDANCE", "Condition", "Family", "framed_time_ids"]

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
        pipelines: classes of diffusers' pipelines whose calls `call` and `encode` stand for; empty: the configuration decides.
        packed: latents of a VAE that a sample of the network's configuration folds into channels (FLUX: 4).
        folded: latents along a side that a sample folds into channels (FLUX.2: 2, since its statistics are of folded latents).
        side: height and width of a sample, where neither configuration nor pipeline says.
        shift: (height and width of a sample) -> flow shift, where the pipeline's call has a rule of its own; None: the
            scheduler's.
        unguided: arguments of the pipeline's call that switch its guidance off.
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
    pipelines: tuple[str, ...] = ()
    packed: int = 1
    folded: int = 1
    side: int = 128
    shift: Callable[[tuple[int, int]], float] | None = None
    unguided: str = "guidance_scale=0"


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


def _tokens(x: Tensor) -> Tensor:
    """Pixels of 2 x 2 latents are a token: [B, C, H, W] -> [B, H W / 4, 4 C]."""
    count, channels, height, width = x.shape
    folded = x.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return folded.reshape(count, height * width // 4, 4 * channels)


def _picture(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_tokens`, of the shape of `like`."""
    count, channels, height, width = like.shape
    folded = tokens.reshape(count, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return folded.reshape(like.shape)


def _places(text: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Tokens are numbered by row and column; text tokens all stand at the origin."""
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    places[..., 1], places[..., 2] = torch.arange(rows)[:, None].to(x), torch.arange(columns)[None].to(x)
    return {
        "txt_ids": torch.zeros(text.shape[1], 3, device=x.device, dtype=x.dtype),
        "img_ids": places.reshape(-1, 3),
    }


def _call_flux(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    output = model(
        hidden_states=_tokens(x), timestep=label / 1000, guidance=cond.get("guidance"), pooled_projections=cond["pooled"],
        encoder_hidden_states=cond["text"], **_places(cond["text"], x), return_dict=False,
    )[0]  # fmt: skip
    return _picture(output, x)


def _encode_twice(
    pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any], empty: str = ""
) -> tuple[tuple[Any, ...], ...]:
    """Encode the prompts, then the negative ones, by an `encode_prompt` that has no argument for the latter."""
    more = dict(more)
    negative = more.pop("negative_prompt", [empty] * len(prompts))
    return tuple(pipeline.encode_prompt(texts, device=device, **more) for texts in (prompts, negative))


def _encode_as(*names: str) -> Callable[[Any, list[str], Any, dict[str, Any]], tuple[Condition, Condition]]:
    """The same by name; what comes after is left."""

    def encode(pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]) -> tuple[Condition, Condition]:
        found, empty = _encode_twice(pipeline, prompts, device, more)
        return dict(zip(names, found, strict=False)), dict(zip(names, empty, strict=False))

    return encode


FLUX_GUIDANCE = 3.5  # its pipeline's default


def _flux_guidance(config: Mapping[str, Any], size: tuple[int, int]) -> Condition:
    """Guidance input of FLUX.1-dev, which was distilled under guidance."""
    return {"guidance": torch.tensor(FLUX_GUIDANCE)} if config.get("guidance_embeds") else {}


def _flux_shapes(config: Mapping[str, Any], tokens: int | None) -> dict[str, tuple[int, ...]]:
    return {"text": (tokens or 512, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}


# -- SANA, PixArt: attention masks for the text --------------------------------------------------------------------------


def _call_sana(model: Any, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    label = label * model.config.timestep_scale
    text = {"encoder_hidden_states": cond["text"], "encoder_attention_mask": cond["mask"]}
    return model(x, timestep=label, **text, return_dict=False)[0]


def _call_pixart(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    sizes: dict[str, Any] = {"resolution": cond.get("resolution"), "aspect_ratio": cond.get("aspect_ratio")}
    output = model(
        x, encoder_hidden_states=cond["text"], encoder_attention_mask=cond["mask"], timestep=label, added_cond_kwargs=sizes,
        return_dict=False,
    )[0]  # fmt: skip
    return output[:, : x.shape[1]]  # the other half is the learnt variance, if any


def _encode_masked(pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]) -> tuple[Condition, Condition]:
    found = pipeline.encode_prompt(prompts, do_classifier_free_guidance=True, device=device, **more)
    return {"text": found[0], "mask": found[1]}, {"text": found[2], "mask": found[3]}


def _pixart_sizes(config: Mapping[str, Any], size: tuple[int, int]) -> Condition:
    if config["sample_size"] != 128:  # only the 1024-pixel model takes the size as an input (PixArt-alpha)
        return {}
    height, width = size
    return {"resolution": torch.tensor(size, dtype=torch.float32), "aspect_ratio": torch.tensor([height / width])}


def _shapes_of(
    *widths: str, usual: int = 512, masked: bool = True
) -> Callable[[Mapping[str, Any], int | None], dict[str, tuple[int, ...]]]:
    """Shapes of text, its widths by their names in the configuration, and of its mask."""
    return lambda config, tokens: (
        {"text": (tokens or usual, *(config[name] for name in widths))}
        | ({"mask": (tokens or usual,)} if masked else {})
    )


# -- FLUX.2 --------------------------------------------------------------------------------------------------------------


def _call_flux2(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    from diffusers import Flux2KleinPipeline

    text = cond["text"]
    output = model(
        hidden_states=Flux2KleinPipeline._pack_latents(x), timestep=label / 1000, guidance=cond.get("guidance"),
        encoder_hidden_states=text, txt_ids=Flux2KleinPipeline._prepare_text_ids(text[:1]).to(x.device),
        img_ids=Flux2KleinPipeline._prepare_latent_ids(x[:1]).to(x.device), return_dict=False,
    )[0]  # fmt: skip
    return output.mT.reshape(x.shape)


def _flux2_shift(size: tuple[int, int]) -> float:
    """The shift of its pipeline's 50 steps: there it also depends on their number, which a teacher's noise law cannot."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    return math.exp(compute_empirical_mu(size[0] * size[1], 50))


# -- Z-Image, Qwen-Image, Lumina 2, Chroma, Krea 2: text of any length, padded where it is kept -----------------------------------


def _padded(rows: Sequence[Tensor], tokens: int) -> Condition:
    """Texts [N_i, D] in one tensor [B, tokens, D], and a mask of what is text."""
    text = torch.stack([torch.cat([row, row.new_zeros(tokens - len(row), row.shape[1])]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=text.device)
    return {"text": text, "mask": torch.arange(tokens, device=text.device) < lengths[:, None]}


def _longest(cond: Condition) -> tuple[Tensor, Tensor | None]:
    """The texts of a batch as its longest needs, and their mask; None if all are as long: attention is fast without one."""
    text, mask = cond["text"], cond["mask"]
    if text.is_meta:  # sizes alone: as long as can be
        return text, None
    longest = max(1, int(mask.sum(1).max()))
    text, mask = text[:, :longest], mask[:, :longest].bool()
    return text, None if mask.all() else mask


def _call_z_image(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    """Its time runs from noise 0 to data 1, and it predicts data minus noise."""
    text, mask = _longest(cond)
    texts = list(text) if mask is None else [row[kept] for row, kept in zip(text, mask, strict=True)]
    output = model(list(x[:, :, None]), (1000 - label) / 1000, texts, return_dict=False)[0]
    return -torch.stack(output)[:, :, 0]


def _encode_z_image(
    pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]
) -> tuple[Condition, Condition]:
    copies = copy.deepcopy(more)  # it writes its template into the lists that it is given
    found = pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=True, **copies)
    return _padded(found[0], more["max_sequence_length"]), _padded(found[1], more["max_sequence_length"])


def _call_qwen(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    text, mask = _longest(cond)
    shapes = [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x)
    output = model(
        hidden_states=_tokens(x), timestep=label / 1000, guidance=None, encoder_hidden_states=text,
        encoder_hidden_states_mask=mask, img_shapes=shapes, return_dict=False,
    )[0]  # fmt: skip
    return _picture(output, x)


def _encode_qwen(pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]) -> tuple[Condition, Condition]:
    """The pipeline has no empty prompt of its own; its authors' examples pass a space."""
    tokens = more["max_sequence_length"]
    pipeline.tokenizer_max_length = tokens  # what is cut is cut where it is counted; the encoder does not look ahead
    found = []
    for text, mask in _encode_twice(pipeline, prompts, device, more, empty=" "):
        kept = torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        found.append(_padded([row[valid] for row, valid in zip(text, kept.to(text.device), strict=True)], tokens))
    return found[0], found[1]


def _call_lumina(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    """Time and sign are those of Z-Image."""
    return -model(x, 1 - label / 1000, cond["text"], cond["mask"], return_dict=False)[0]


def _call_chroma(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    """The mask is of numbers, as its pipeline has it, and covers text and picture."""
    text, mask, tokens = cond["text"], cond["mask"], _tokens(x)
    output = model(
        hidden_states=tokens, timestep=label / 1000, encoder_hidden_states=text, **_places(text, x),
        attention_mask=torch.cat([mask.to(text), text.new_ones(tokens.shape[:2])], 1), return_dict=False,
    )[0]  # fmt: skip
    return _picture(output, x)


def _encode_chroma(pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]) -> tuple[Condition, Condition]:
    found = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=True, **more)
    return {"text": found[0], "mask": found[2]}, {"text": found[3], "mask": found[5]}


def _call_krea2(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    """Its text is a stack of the encoder's layers, with padding in the middle."""
    from diffusers import Krea2Pipeline

    text = cond["text"]
    places = Krea2Pipeline.prepare_position_ids(text.shape[1], x.shape[2] // 2, x.shape[3] // 2, x.device)
    return _picture(model(_tokens(x), text, label / 1000, places, cond["mask"].bool(), return_dict=False)[0], x)


def _layer(container: str, inner: str = "", count: str = "num_layers") -> Callable[[Mapping[str, Any]], str]:
    """The middle one of a container's layers, or a layer in it."""
    return lambda config: f"{container}.{config[count] // 2}{inner}"


FAMILIES: dict[str, Family] = {
    "UNet2DModel": Family("unet", _call_ddpm, None, bottleneck=lambda config: "mid_block"),
    "UNet2DConditionModel": Family(
        "unet", _call_unet, _encode_clip, _time_ids, lambda config: "mid_block", shapes=_unet_shapes
    ),
    "SD3Transformer2DModel": Family(
        "transformer", _call_sd3, _encode_sd3, bottleneck=_layer("transformer_blocks", ".ff"), shapes=_sd3_shapes,
        pipelines=("StableDiffusion3Pipeline",),
    ),
    "FluxTransformer2DModel": Family(
        "transformer", _call_flux, _encode_as("text", "pooled"), _flux_guidance, _layer("transformer_blocks", ".ff"),
        lambda config: bool(config.get("guidance_embeds")), _flux_shapes, own_sigmas=True, pipelines=("FluxPipeline",), packed=4,
    ),
    "SanaTransformer2DModel": Family(
        "transformer", _call_sana, _encode_masked, shapes=_shapes_of("caption_channels", usual=300),
        pipelines=("SanaPipeline", "SanaPAGPipeline", "SanaSprintPipeline"),  # the last is refused for what it is
    ),
    "PixArtTransformer2DModel": Family(
        "transformer", _call_pixart, _encode_masked, _pixart_sizes, shapes=_shapes_of("caption_channels", usual=300),
        pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    ),
    "Flux2Transformer2DModel": Family(
        "transformer", _call_flux2, _encode_as("text"), bottleneck=_layer("transformer_blocks", ".ff"),
        shapes=_shapes_of("joint_attention_dim", masked=False), own_sigmas=True, pipelines=("Flux2KleinPipeline",), folded=2, side=64,
        shift=_flux2_shift,
    ),
    "ZImageTransformer2DModel": Family(
        "transformer", _call_z_image, _encode_z_image, bottleneck=_layer("layers", count="n_layers"),
        shapes=_shapes_of("cap_feat_dim"), own_sigmas=True, pipelines=("ZImagePipeline",),
    ),
    "QwenImageTransformer2DModel": Family(
        "transformer", _call_qwen, _encode_qwen, bottleneck=_layer("transformer_blocks", ".img_mlp"),
        shapes=_shapes_of("joint_attention_dim"), own_sigmas=True, pipelines=("QwenImagePipeline",), packed=4,
        unguided="true_cfg_scale=1",
    ),
    "Lumina2Transformer2DModel": Family(
        "transformer", _call_lumina, _encode_masked, bottleneck=_layer("layers"),
        shapes=_shapes_of("cap_feat_dim", usual=256), own_sigmas=True, pipelines=("Lumina2Pipeline",),
    ),
    "Krea2Transformer2DModel": Family(
        "transformer", _call_krea2, _encode_as("text", "mask"), shapes=_shapes_of("num_text_layers", "text_hidden_dim"),
        own_sigmas=True, pipelines=("Krea2Pipeline",), packed=4,
    ),
    "ChromaTransformer2DModel": Family(
        "transformer", _call_chroma, _encode_chroma, bottleneck=_layer("transformer_blocks", ".ff"),
        shapes=_shapes_of("joint_attention_dim"), own_sigmas=True, pipelines=("ChromaPipeline",), packed=4,
    ),
}  # fmt: skip
