"""SANA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fewstep.networks.families.base import Condition, Family, encode_masked, shapes_of

__all__ = ["FAMILY"]


def _call_sana(model: Any, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    label = label * model.config.timestep_scale
    text = {"encoder_hidden_states": cond["text"], "encoder_attention_mask": cond["mask"]}
    return model(x, timestep=label, **text, return_dict=False)[0]


FAMILY = Family(
    "transformer", _call_sana, encode_masked, shapes=shapes_of("caption_channels", usual=300),
    pipelines=("SanaPipeline", "SanaPAGPipeline", "SanaSprintPipeline"),  # the last is refused for what it is
)  # fmt: skip
