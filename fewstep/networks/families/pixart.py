"""PixArt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.families.base import Condition, Family, encode_masked, shapes_of

__all__ = ["FAMILY"]


def _call_pixart(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    sizes: dict[str, Any] = {"resolution": cond.get("resolution"), "aspect_ratio": cond.get("aspect_ratio")}
    output = model(
        x, encoder_hidden_states=cond["text"], encoder_attention_mask=cond["mask"], timestep=label, added_cond_kwargs=sizes,
        return_dict=False,
    )[0]  # fmt: skip
    return output[:, : x.shape[1]]  # the other half is the learnt variance, if any


def _pixart_sizes(config: Mapping[str, Any], size: tuple[int, int]) -> Condition:
    if config["sample_size"] != 128:  # only the 1024-pixel model takes the size as an input (PixArt-alpha)
        return {}
    height, width = size
    return {"resolution": torch.tensor(size, dtype=torch.float32), "aspect_ratio": torch.tensor([height / width])}


FAMILY = Family(
    "transformer", _call_pixart, encode_masked, _pixart_sizes, shapes=shapes_of("caption_channels", usual=300),
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
)  # fmt: skip
