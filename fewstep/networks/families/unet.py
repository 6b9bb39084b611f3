"""UNets: Stable Diffusion 1.5, 2.1, SDXL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.families.base import Condition, Family

__all__ = ["FAMILY", "framed_time_ids"]


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


FAMILY = Family(
    "unet", _call_unet, _encode_clip, _time_ids, lambda config: "mid_block", shapes=_unet_shapes
)  # fmt: skip
