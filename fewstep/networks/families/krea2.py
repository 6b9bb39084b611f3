"""Krea 2."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.networks.families.base import Condition, Family, encode_as, fold, shapes_of, unfold

__all__ = ["FAMILY"]


def _call_krea2(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    """Its text is a stack of the encoder's layers, with padding in the middle."""
    from diffusers import Krea2Pipeline

    text = cond["text"]
    places = Krea2Pipeline.prepare_position_ids(text.shape[1], x.shape[2] // 2, x.shape[3] // 2, x.device)
    return unfold(model(fold(x), text, label / 1000, places, cond["mask"].bool(), return_dict=False)[0], x)


FAMILY = Family(
    "transformer", _call_krea2, encode_as("text", "mask"), shapes=shapes_of("num_text_layers", "text_hidden_dim"),
    own_sigmas=True, pipelines=("Krea2Pipeline",), packed=4,
)  # fmt: skip
