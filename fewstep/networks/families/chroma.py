"""Chroma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.families.base import Condition, Family, fold, middle_layer, shapes_of, token_places, unfold

__all__ = ["FAMILY"]


def _call_chroma(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    """The mask is of numbers, as its pipeline has it, and covers text and picture."""
    text, mask, tokens = cond["text"], cond["mask"], fold(x)
    output = model(
        hidden_states=tokens, timestep=label / 1000, encoder_hidden_states=text, **token_places(text, x),
        attention_mask=torch.cat([mask.to(text), text.new_ones(tokens.shape[:2])], 1), return_dict=False,
    )[0]  # fmt: skip
    return unfold(output, x)


def _encode_chroma(pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]) -> tuple[Condition, Condition]:
    found = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=True, **more)
    return {"text": found[0], "mask": found[2]}, {"text": found[3], "mask": found[5]}


FAMILY = Family(
    "transformer", _call_chroma, _encode_chroma, bottleneck=middle_layer("transformer_blocks", ".ff"),
    shapes=shapes_of("joint_attention_dim"), own_sigmas=True, pipelines=("ChromaPipeline",), packed=4,
)  # fmt: skip
