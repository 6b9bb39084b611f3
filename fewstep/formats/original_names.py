"""Map from diffusers' layer names to those of the original programs.

Files for ComfyUI, kohya's and Stability's programs use the original names. Knows only names: no tensors, no files. diffusers
has such maps only for whole checkpoints (`convert_ldm_unet_checkpoint` and the like, with which the tests compare), and for
LoRA files of SDXL and full-size FLUX.1, but not for other sizes, Stable Diffusion 1.5 or 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Place", "original_layers", "original_unet_paths"]


@dataclass(frozen=True)
class Place:
    """Counterpart of one layer of the original program in diffusers' network.

    Attributes:
        paths: the layers that share its rows, in order: query, key and value were often one layer.
        swapped: the two halves of its rows, shift and scale, are in reverse order.
    """

    paths: tuple[str, ...]
    swapped: bool = False


def original_layers(network: Any) -> dict[str, Place]:
    """Counterparts by original name, for UNets, SD3 and FLUX transformers; empty for other networks."""
    tables = {
        "UNet2DConditionModel": _unet,
        "SD3Transformer2DModel": _sd3,
        "FluxTransformer2DModel": _flux,
    }
    table = tables.get(type(network).__name__)
    paths = {path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    places = table(network) if table is not None else {}
    return {name: place for name, place in places.items() if paths.issuperset(place.paths)}


def original_unet_paths(network: Any) -> dict[str, str]:
    """Original path of every module of a UNet, by diffusers' path."""
    return {place.paths[0]: name for name, place in _unet(network).items()}


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def _unet(network: Any) -> dict[str, Place]:
    """Stable Diffusion 1 and 2, SDXL: numbered blocks of a resnet, an attention and a change of size."""
    moved = {  # a layer or a block here: there
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2", "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
    }  # fmt: skip
    number = 1
    for level, block in enumerate(network.down_blocks):
        for layer in range(len(block.resnets)):
            moved[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            moved[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            moved[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for level, block in enumerate(network.up_blocks):
        for layer in range(len(block.resnets)):
            moved[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            moved[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        slot = 2 if any(name.startswith("attentions.") for name, _ in block.named_modules()) else 1
        moved[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{slot}.conv"
    found = {}
    for path, _ in network.named_modules():
        for here, there in moved.items():
            if path == here:
                found[there] = Place((path,))
            elif path.startswith(f"{here}."):
                inner = path.removeprefix(f"{here}.")
                found[f"{there}.{RESNET.get(inner, inner)}"] = Place((path,))
    return found


def _sd3(network: Any) -> dict[str, Place]:
    """Stable Diffusion 3 and 3.5."""
    found = {
        "x_embedder.proj": Place(("pos_embed.proj",)),
        "context_embedder": Place(("context_embedder",)),
        "t_embedder.mlp.0": Place(("time_text_embed.timestep_embedder.linear_1",)),
        "t_embedder.mlp.2": Place(("time_text_embed.timestep_embedder.linear_2",)),
        "y_embedder.mlp.0": Place(("time_text_embed.text_embedder.linear_1",)),
        "y_embedder.mlp.2": Place(("time_text_embed.text_embedder.linear_2",)),
        "final_layer.linear": Place(("proj_out",)),
        "final_layer.adaLN_modulation.1": Place(("norm_out.linear",), swapped=True),
    }
    last = len(network.transformer_blocks) - 1
    for number in range(last + 1):
        here = f"transformer_blocks.{number}"
        image, text = (f"joint_blocks.{number}.{part}_block" for part in ("x", "context"))
        found |= {
            f"{image}.attn.qkv": _together(f"{here}.attn", "to_q", "to_k", "to_v"),
            f"{image}.attn2.qkv": _together(f"{here}.attn2", "to_q", "to_k", "to_v"),
            f"{text}.attn.qkv": _together(f"{here}.attn", "add_q_proj", "add_k_proj", "add_v_proj"),
            f"{image}.attn.proj": Place((f"{here}.attn.to_out.0",)),
            f"{image}.attn2.proj": Place((f"{here}.attn2.to_out.0",)),
            f"{text}.attn.proj": Place((f"{here}.attn.to_add_out",)),
            f"{image}.mlp.fc1": Place((f"{here}.ff.net.0.proj",)),
            f"{image}.mlp.fc2": Place((f"{here}.ff.net.2",)),
            f"{text}.mlp.fc1": Place((f"{here}.ff_context.net.0.proj",)),
            f"{text}.mlp.fc2": Place((f"{here}.ff_context.net.2",)),
            f"{image}.adaLN_modulation.1": Place((f"{here}.norm1.linear",)),
            # the last block ends the text stream: only a shift and a scale
            f"{text}.adaLN_modulation.1": Place((f"{here}.norm1_context.linear",), swapped=number == last),
        }
    return found


def _flux(network: Any) -> dict[str, Place]:
    """FLUX.1."""
    found = {
        "img_in": Place(("x_embedder",)),
        "txt_in": Place(("context_embedder",)),
        "final_layer.linear": Place(("proj_out",)),
        "final_layer.adaLN_modulation.1": Place(("norm_out.linear",), swapped=True),
    }
    for there, here in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        for part, number in (("in_layer", 1), ("out_layer", 2)):
            found[f"{there}_in.{part}"] = Place((f"time_text_embed.{here}_embedder.linear_{number}",))
    for number in range(len(network.transformer_blocks)):
        here, there = f"transformer_blocks.{number}", f"double_blocks.{number}"
        found |= {
            f"{there}.img_attn.qkv": _together(f"{here}.attn", "to_q", "to_k", "to_v"),
            f"{there}.txt_attn.qkv": _together(f"{here}.attn", "add_q_proj", "add_k_proj", "add_v_proj"),
            f"{there}.img_attn.proj": Place((f"{here}.attn.to_out.0",)),
            f"{there}.txt_attn.proj": Place((f"{here}.attn.to_add_out",)),
            f"{there}.img_mlp.0": Place((f"{here}.ff.net.0.proj",)),
            f"{there}.img_mlp.2": Place((f"{here}.ff.net.2",)),
            f"{there}.txt_mlp.0": Place((f"{here}.ff_context.net.0.proj",)),
            f"{there}.txt_mlp.2": Place((f"{here}.ff_context.net.2",)),
            f"{there}.img_mod.lin": Place((f"{here}.norm1.linear",)),
            f"{there}.txt_mod.lin": Place((f"{here}.norm1_context.linear",)),
        }
    for number in range(len(network.single_transformer_blocks)):
        here, there = f"single_transformer_blocks.{number}", f"single_blocks.{number}"
        found |= {
            f"{there}.linear1": _together(here, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            f"{there}.linear2": Place((f"{here}.proj_out",)),
            f"{there}.modulation.lin": Place((f"{here}.norm.linear",)),
        }
    return found


def _together(block: str, *layers: str) -> Place:
    return Place(tuple(f"{block}.{layer}" for layer in layers))
