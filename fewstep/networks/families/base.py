"""The record of a family, and what families share: folding, places, padding, prompts encoded by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "Condition",
    "Family",
    "encode_as",
    "encode_masked",
    "encode_twice",
    "fold",
    "middle_layer",
    "pad_rows",
    "shapes_of",
    "token_places",
    "trim",
    "unfold",
]

Condition = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """Calling convention of one kind of network of diffusers.

    Attributes:
        component: the network's name in a pipeline.
        call: (network, noisy samples, label, condition) -> raw prediction of the samples' shape.
        encode: (pipeline, prompts, device, further arguments of its `encode_prompt`) -> (conditions of the prompts, of as many
            empty ones), each tensor [count, ...]. The arguments hold `negative_prompt`, as many texts instead of the empty ones,
            where a negative prompt is wanted. None: the network is unconditional.
        constants: (network's configuration, height and width of a picture) -> conditions equal for all samples, each [...].
        bottleneck: configuration -> the layer whose output a GAN head reads.
        own_sigmas: the pipeline's call itself passes its scheduler the noise levels 1, 1 - 1/K, ..., 1/K of K steps.
        pipelines: classes of diffusers' pipelines whose calls `call` and `encode` stand for; empty: the configuration decides.
        packed: latents of a VAE that a sample of the network's configuration folds into channels (FLUX: 4).
        folded: latents along a side that a sample folds into channels (FLUX.2: 2, since its statistics are of folded latents).
        side: height and width of a sample, where neither configuration nor pipeline says.
        shift: (height and width of a sample) -> flow shift, where the pipeline's call has a rule of its own; None: the
            scheduler's.
        unguided: arguments of the pipeline's call that switch its guidance off.
        guidance: guidance input that the pipeline's call passes by itself to networks that take one (`guidance_embeds`).
        shapes: (configuration, tokens that T5 or Gemma reads) -> the shapes of what `encode` gives for one prompt, for `fewstep
            plan`; None: the usual number.
    """

    component: Literal["unet", "transformer"]
    call: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor]
    encode: Callable[[Any, list[str], Any, dict[str, Any]], tuple[Condition, Condition]] | None
    constants: Callable[[Mapping[str, Any], tuple[int, int]], Condition] = lambda config, size: {}
    bottleneck: Callable[[Mapping[str, Any]], str] = lambda config: f"transformer_blocks.{config['num_layers'] // 2}"
    shapes: Callable[[Mapping[str, Any], int | None], dict[str, tuple[int, ...]]] = lambda config, tokens: {}
    own_sigmas: bool = False
    pipelines: tuple[str, ...] = ()
    packed: int = 1
    folded: int = 1
    side: int = 128
    shift: Callable[[tuple[int, int]], float] | None = None
    unguided: str = "guidance_scale=0"
    guidance: float | None = None

    def guided_inside(self, config: Mapping[str, Any]) -> bool:
        """Return whether guidance is an input of the network, so that `objective.guidance` is an error."""
        return self.guidance is not None and bool(config.get("guidance_embeds"))


def fold(x: Tensor) -> Tensor:
    """Pixels of 2 x 2 latents are a token: [B, C, H, W] -> [B, H W / 4, 4 C]."""
    count, channels, height, width = x.shape
    folded = x.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return folded.reshape(count, height * width // 4, 4 * channels)


def unfold(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of `fold`, of the shape of `like`."""
    count, channels, height, width = like.shape
    folded = tokens.reshape(count, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return folded.reshape(like.shape)


def token_places(text: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Tokens are numbered by row and column; text tokens all stand at the origin."""
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    places[..., 1], places[..., 2] = torch.arange(rows)[:, None].to(x), torch.arange(columns)[None].to(x)
    return {
        "txt_ids": torch.zeros(text.shape[1], 3, device=x.device, dtype=x.dtype),
        "img_ids": places.reshape(-1, 3),
    }


def encode_twice(
    pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any], empty: str = ""
) -> tuple[tuple[Any, ...], ...]:
    """Encode the prompts, then the negative ones, by an `encode_prompt` that has no argument for the latter."""
    more = dict(more)
    negative = more.pop("negative_prompt", [empty] * len(prompts))
    return tuple(pipeline.encode_prompt(texts, device=device, **more) for texts in (prompts, negative))


def encode_as(*names: str) -> Callable[[Any, list[str], Any, dict[str, Any]], tuple[Condition, Condition]]:
    """The same by name; what comes after is left."""

    def encode(pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]) -> tuple[Condition, Condition]:
        found, empty = encode_twice(pipeline, prompts, device, more)
        return dict(zip(names, found, strict=False)), dict(zip(names, empty, strict=False))

    return encode


def encode_masked(pipeline: Any, prompts: list[str], device: Any, more: dict[str, Any]) -> tuple[Condition, Condition]:
    found = pipeline.encode_prompt(prompts, do_classifier_free_guidance=True, device=device, **more)
    return {"text": found[0], "mask": found[1]}, {"text": found[2], "mask": found[3]}


def shapes_of(
    *widths: str, usual: int = 512, masked: bool = True
) -> Callable[[Mapping[str, Any], int | None], dict[str, tuple[int, ...]]]:
    """Shapes of text, its widths by their names in the configuration, and of its mask."""
    return lambda config, tokens: (
        {"text": (tokens or usual, *(config[name] for name in widths))}
        | ({"mask": (tokens or usual,)} if masked else {})
    )


def pad_rows(rows: Sequence[Tensor], tokens: int) -> Condition:
    """Texts [N_i, D] in one tensor [B, tokens, D], and a mask of what is text."""
    text = torch.stack([torch.cat([row, row.new_zeros(tokens - len(row), row.shape[1])]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=text.device)
    return {"text": text, "mask": torch.arange(tokens, device=text.device) < lengths[:, None]}


def trim(cond: Condition) -> tuple[Tensor, Tensor | None]:
    """The texts of a batch as its longest needs, and their mask; None if all are as long: attention is fast without one."""
    text, mask = cond["text"], cond["mask"]
    if text.is_meta:  # sizes alone: as long as can be
        return text, None
    longest = max(1, int(mask.sum(1).max()))
    text, mask = text[:, :longest], mask[:, :longest].bool()
    return text, None if mask.all() else mask


def middle_layer(container: str, inner: str = "", count: str = "num_layers") -> Callable[[Mapping[str, Any]], str]:
    """The middle one of a container's layers, or a layer in it."""
    return lambda config: f"{container}.{config[count] // 2}{inner}"
