"""Adapters in the two common LoRA forms. Pure functions from adapters to tensors by name.

PEFT's (diffusers; ComfyUI for transformers): `unet.PATH.lora_A.weight`. kohya's (ComfyUI, A1111, Forge, sd-scripts):
`lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight`, `.lora_up.weight` and `.alpha`; readers scale by alpha / rank.

ComfyUI reads no alpha from metadata, and without a tensor `.alpha` uses the rank; diffusers does not expect that tensor among
PEFT's names. So PEFT's form has alpha / rank multiplied into its matrices, and alpha equals the rank for every reader.
kohya's scripts know SDXL's layers only by the original program's names, and Stable Diffusion's by diffusers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fewstep.formats.original_names import original_layers
from fewstep.networks.lora import LoraSpec
from fewstep.system.tensors import Entry

__all__ = ["kohya_entries", "peft_config", "peft_entries"]

Adapters = Mapping[str, tuple[Entry, Entry]]
"""A and B by the path of their layer in diffusers' network."""


def peft_entries(adapters: Adapters, spec: LoraSpec, component: str) -> dict[str, Entry]:
    """A times alpha / rank, and B, by diffusers' layer names.

    B begins at zero and may be small: divided by eight it would lose digits in float16.
    """
    found = {}
    for path, (down, up) in adapters.items():
        found[f"{component}.{path}.lora_A.weight"] = down.then(lambda down: down * (spec.alpha / spec.rank))
        found[f"{component}.{path}.lora_B.weight"] = up
    return found


def peft_config(adapters: Adapters, spec: LoraSpec, component: str) -> dict[str, Any]:
    """PEFT's settings with diffusers' names, for the file's metadata; alpha is the rank, as in a file without them."""
    config = {
        "r": spec.rank,
        "lora_alpha": spec.rank,
        "target_modules": sorted(adapters),
        "init_lora_weights": True,
    }
    return {f"{component}.{name}": value for name, value in config.items()}


def kohya_entries(adapters: Adapters, spec: LoraSpec, network: nn.Module, dtype: torch.dtype) -> dict[str, Entry]:
    """Adapters in kohya's form, with the true alpha.

    Args:
        adapters: A and B.
        spec: rank and alpha.
        network: diffusers' UNet, possibly without storage; SDXL's layers get their original names.
        dtype: dtype of alpha.
    """
    config: Any = network.config
    names = {path: path for path in adapters}
    if config.get("addition_embed_type") == "text_time":
        names |= {place.paths[0]: name for name, place in original_layers(network).items() if len(place.paths) == 1}
    found = {}
    for path, (down, up) in adapters.items():
        name = f"lora_unet_{names[path].replace('.', '_')}"
        found[f"{name}.lora_down.weight"] = down
        found[f"{name}.lora_up.weight"] = up
        found[f"{name}.alpha"] = Entry((), dtype, lambda: torch.tensor(float(spec.alpha), dtype=dtype))
    return found
