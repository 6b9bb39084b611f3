"""FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fewstep.networks.families.base import Condition, Family, encode_as, fold, middle_layer, token_places, unfold

__all__ = ["FAMILY"]


def _call_flux(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    output = model(
        hidden_states=fold(x), timestep=label / 1000, guidance=cond.get("guidance"), pooled_projections=cond["pooled"],
        encoder_hidden_states=cond["text"], **token_places(cond["text"], x), return_dict=False,
    )[0]  # fmt: skip
    return unfold(output, x)


def _flux_shapes(config: Mapping[str, Any], tokens: int | None) -> dict[str, tuple[int, ...]]:
    return {"text": (tokens or 512, config["joint_attention_dim"]), "pooled": (config["pooled_projection_dim"],)}


FAMILY = Family(
    "transformer", _call_flux, encode_as("text", "pooled"), bottleneck=middle_layer("transformer_blocks", ".ff"),
    shapes=_flux_shapes, own_sigmas=True, pipelines=("FluxPipeline",), packed=4, guidance=3.5,
)  # fmt: skip
