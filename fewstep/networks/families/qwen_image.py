"""Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.families.base import (
    Condition,
    Family,
    encode_twice,
    fold,
    middle_layer,
    pad_rows,
    shapes_of,
    trim,
    unfold,
)

__all__ = ["FAMILY"]


def _call_qwen(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    text, mask = trim(cond)
    shapes = [[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x)
    output = model(
        hidden_states=fold(x), timestep=label / 1000, guidance=None, encoder_hidden_states=text,
        encoder_hidden_states_mask=mask, img_shapes=shapes, return_dict=False,
    )[0]  # fmt: skip
    return unfold(output, x)


def _encode_qwen(pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]) -> tuple[Condition, Condition]:
    """The pipeline has no empty prompt of its own; its authors' examples pass a space."""
    tokens = more["max_sequence_length"]
    pipeline.tokenizer_max_length = tokens  # what is cut is cut where it is counted; the encoder does not look ahead
    found = []
    for text, mask in encode_twice(pipeline, prompts, device, more, empty=" "):
        kept = torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        found.append(pad_rows([row[valid] for row, valid in zip(text, kept.to(text.device), strict=True)], tokens))
    return found[0], found[1]


FAMILY = Family(
    "transformer", _call_qwen, _encode_qwen, bottleneck=middle_layer("transformer_blocks", ".img_mlp"),
    shapes=shapes_of("joint_attention_dim"), own_sigmas=True, pipelines=("QwenImagePipeline",), packed=4,
    unguided="true_cfg_scale=1",
)  # fmt: skip
