"""LongCat-Image: FLUX's blocks without pooled text; the places of text and picture are its pipeline's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fewstep.networks.families.base import Condition, Family, fold, middle_layer, shapes_of, unfold

__all__ = ["FAMILY"]

_TOKENS = 512  # text is padded to so many tokens, without a mask; places of the picture begin after them


def _call_longcat(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids

    text, rows, columns = cond["text"], x.shape[2] // 2, x.shape[3] // 2
    picture = prepare_pos_ids(1, "image", (_TOKENS, _TOKENS), height=rows, width=columns)
    output = model(
        hidden_states=fold(x), timestep=label / 1000, encoder_hidden_states=text, guidance=None, return_dict=False,
        txt_ids=prepare_pos_ids(0, "text", num_token=text.shape[1]).to(x.device), img_ids=picture.to(x.device),
    )[0]  # fmt: skip
    return unfold(output, x)


def _encode_longcat(
    pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]
) -> tuple[Condition, Condition]:
    """As written: its call would let the text encoder rewrite prompts first, unless `enable_prompt_rewrite` is off."""
    negative = more.get("negative_prompt", [""] * len(prompts))
    text, empty = (pipeline.encode_prompt(texts)[0] for texts in (prompts, negative))
    return {"text": text}, {"text": empty}


FAMILY = Family(
    "transformer", _call_longcat, _encode_longcat, bottleneck=middle_layer("transformer_blocks", ".ff"),
    shapes=shapes_of("joint_attention_dim", masked=False), own_sigmas=True, pipelines=("LongCatImagePipeline",), packed=4,
    unguided="guidance_scale=0, enable_prompt_rewrite=False",
)  # fmt: skip
