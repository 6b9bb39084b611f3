"""FLUX.2: dev, which takes its guidance as an input, and klein, which does not."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fewstep.networks.families.base import Condition, Family, encode_as, middle_layer, shapes_of

__all__ = ["FAMILY"]


def _call_flux2(model: nn.Module, x: Tensor, label: Tensor, cond: Condition) -> Tensor:
    from diffusers import Flux2KleinPipeline

    text = cond["text"]
    output = model(
        hidden_states=Flux2KleinPipeline._pack_latents(x), timestep=label / 1000, guidance=cond.get("guidance"),
        encoder_hidden_states=text, txt_ids=Flux2KleinPipeline._prepare_text_ids(text[:1]).to(x.device),
        img_ids=Flux2KleinPipeline._prepare_latent_ids(x[:1]).to(x.device), return_dict=False,
    )[0]  # fmt: skip
    return output.mT.reshape(x.shape)


def _flux2_shift(size: tuple[int, int]) -> float:
    """The shift of its pipelines' 50 steps: there it also depends on their number, which a teacher's noise law cannot."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    return math.exp(compute_empirical_mu(size[0] * size[1], 50))


FAMILY = Family(
    "transformer", _call_flux2, encode_as("text"), bottleneck=middle_layer("transformer_blocks", ".ff"),
    shapes=shapes_of("joint_attention_dim", masked=False), own_sigmas=True, folded=2, side=64, shift=_flux2_shift,
    pipelines=("Flux2KleinPipeline", "Flux2Pipeline"), guidance=4.0,
)  # fmt: skip
