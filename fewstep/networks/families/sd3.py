"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fewstep.networks.families.base import Condition, Family, middle_layer

__all__ = ["FAMILY"]


def _call_sd3(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    text, pooled = cond["text"], cond["pooled"]
    return model(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=label, return_dict=False)[0]


def _encode_sd3(pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]) -> tuple[Condition, Condition]:
    found = pipeline.encode_prompt(prompts, prompts, prompts, device=device, do_classifier_free_guidance=True, **more)
    return {"text": found[0], "pooled": found[2]}, {"text": found[1], "pooled": found[3]}


def _sd3_shapes(config: Mapping[str, Any], tokens: int | None) -> dict[str, tuple[int, ...]]:
    """77 tokens of CLIP and 256 of T5."""
    return {"text": (77 + (tokens or 256), config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}


FAMILY = Family(
    "transformer", _call_sd3, _encode_sd3, bottleneck=middle_layer("transformer_blocks", ".ff"), shapes=_sd3_shapes,
    pipelines=("StableDiffusion3Pipeline",),
)  # fmt: skip
