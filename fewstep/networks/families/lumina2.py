"""Lumina 2."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.networks.families.base import Condition, Family, encode_masked, middle_layer, shapes_of

__all__ = ["FAMILY"]


def _call_lumina(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    """Time and sign are those of Z-Image."""
    return -model(x, 1 - label / 1000, cond["text"], cond["mask"], return_dict=False)[0]


FAMILY = Family(
    "transformer", _call_lumina, encode_masked, bottleneck=middle_layer("layers"),
    shapes=shapes_of("cap_feat_dim", usual=256), own_sigmas=True, pipelines=("Lumina2Pipeline",),
)  # fmt: skip
