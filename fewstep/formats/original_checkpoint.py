"""Stable Diffusion 1 and SDXL as one checkpoint with the original programs' names: network, VAE and text encoders.

ComfyUI's checkpoint loader, A1111, Forge and kohya's scripts read it. Tensors are made on writing. diffusers has this
conversion only in a script; the tests compare with its `from_single_file`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.formats.original_names import original_unet_paths
from fewstep.system.errors import FileError
from fewstep.system.tensors import Entry

__all__ = ["original_checkpoint"]

Entries = Mapping[str, Entry]


def original_checkpoint(
    network: Any, parts: Mapping[str, Entries], v_prediction: bool, zero_snr: bool
) -> dict[str, Entry]:
    """Make the tensors of a checkpoint.

    Args:
        network: diffusers' UNet, possibly without storage.
        parts: weights of `unet`, `vae`, `text_encoder` and, for SDXL, `text_encoder_2`, by their names in diffusers' folders.
        v_prediction: add the key `v_pred`, which ComfyUI and Forge read.
        zero_snr: add the key `ztsnr`.

    Raises:
        FileError: parts of another family, such as Stable Diffusion 2's text encoder.
    """
    found = _unet(network, parts["unet"]) | _vae(parts["vae"])
    if "text_encoder_2" in parts:
        found |= _clip(parts["text_encoder"], "conditioner.embedders.0.transformer")
        found |= _open_clip(parts["text_encoder_2"])
    else:
        width = next(entry.shape[-1] for name, entry in parts["text_encoder"].items() if "token_embedding" in name)
        if width == 1024:
            raise FileError(
                "a checkpoint under the original names is made of Stable Diffusion 1 and SDXL, got Stable Diffusion 2, whose text "
                "encoder has lost its last layer in diffusers. Try: --formats unet"
            )
        found |= _clip(parts["text_encoder"], "cond_stage_model.transformer")
    marks = (["v_pred"] if v_prediction else []) + (["ztsnr"] if zero_snr else [])
    return found | {name: Entry((0,), torch.float32, lambda: torch.empty(0)) for name in marks}


def _unet(network: Any, entries: Entries) -> dict[str, Entry]:
    paths = original_unet_paths(network)
    found = {}
    for name, entry in entries.items():
        path, _, part = name.rpartition(".")
        found[f"model.diffusion_model.{paths[path]}.{part}"] = entry
    return found


_VAE = (  # diffusers' names, the original's; numbers of the decoder's levels run the other way
    (r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r"\1.\2.\3.block.\4."),
    (r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r"\1.\2.\3.\4sample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"attn_1\.group_norm\.", "attn_1.norm."),
    (r"attn_1\.(?:to_)?(q|k|v)(?:uery|ey|alue)?\.", r"attn_1.\1."),
    (r"attn_1\.(?:to_out\.0|proj_attn)\.", "attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


def _vae(entries: Entries) -> dict[str, Entry]:
    last = max(int(match[1]) for name in entries if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))
    found = {}
    for name, entry in entries.items():
        for pattern, new in _VAE:
            name = re.sub(pattern, new, name)
        name = re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{last - int(match[1])}", name)
        if ".attn_1." in name and len(entry.shape) == 2:  # linear layers were convolutions once
            entry = entry.then(lambda weight: weight[..., None, None], (*entry.shape, 1, 1))
        found[f"first_stage_model.{name}"] = entry
    return found


def _bare(entries: Entries) -> dict[str, Entry]:
    """A text encoder's weights without prefix; CLIP's are below `text_model` in some versions of transformers."""
    return {name.removeprefix("text_model."): entry for name, entry in entries.items()}


def _clip(entries: Entries, prefix: str) -> dict[str, Entry]:
    return {f"{prefix}.text_model.{name}": entry for name, entry in _bare(entries).items()}


_OPEN_CLIP = (
    (r"^encoder\.layers\.", "transformer.resblocks."), (r"\.layer_norm(\d)\.", r".ln_\1."), (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."), (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"^embeddings\.token_embedding\.", "token_embedding."), (r"^embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^final_layer_norm\.", "ln_final."), (r"^text_projection\.weight$", "text_projection"),
)  # fmt: skip


def _open_clip(entries: Entries) -> dict[str, Entry]:
    """SDXL's second text encoder in OpenCLIP's layout: query, key and value are one matrix."""
    found = {}
    bare = {name: entry for name, entry in _bare(entries).items() if not name.endswith("position_ids")}
    for name, entry in bare.items():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            if match[2] == "q":
                block = f"encoder.layers.{match[1]}.self_attn"
                three = [bare[f"{block}.{letter}_proj.{match[3]}"] for letter in "qkv"]
                rows = sum(part.shape[0] for part in three)
                found[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = Entry(
                    (rows, *entry.shape[1:]), entry.dtype, _together(three)
                )
            continue
        for pattern, new in _OPEN_CLIP:
            name = re.sub(pattern, new, name)
        if name == "text_projection":
            entry = entry.then(lambda weight: weight.T, (entry.shape[1], entry.shape[0]))
        found[name] = entry
    return {f"conditioner.embedders.1.model.{name}": entry for name, entry in found.items()}


def _together(parts: Iterable[Entry]) -> Any:
    def make() -> Tensor:
        return torch.cat([part.make() for part in parts])

    return make
