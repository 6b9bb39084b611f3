"""Z-Image."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.families.base import Condition, Family, middle_layer, pad_rows, shapes_of, trim

__all__ = ["FAMILY"]


def _call_z_image(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    """Its time runs from noise 0 to data 1, and it predicts data minus noise."""
    text, mask = trim(cond)
    texts = list(text) if mask is None else [row[kept] for row, kept in zip(text, mask, strict=True)]
    output = model(list(x[:, :, None]), (1000 - label) / 1000, texts, return_dict=False)[0]
    return -torch.stack(output)[:, :, 0]


def _encode_z_image(
    pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]
) -> tuple[Condition, Condition]:
    copies = copy.deepcopy(more)  # it writes its template into the lists that it is given
    found = pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=True, **copies)
    return pad_rows(found[0], more["max_sequence_length"]), pad_rows(found[1], more["max_sequence_length"])


FAMILY = Family(
    "transformer", _call_z_image, _encode_z_image, bottleneck=middle_layer("layers", count="n_layers"),
    shapes=shapes_of("cap_feat_dim"), own_sigmas=True, pipelines=("ZImagePipeline",),
)  # fmt: skip
