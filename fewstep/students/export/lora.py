"""Adapters in the two forms that programs read. Pure functions from adapters to tensors by name.

PEFT's (diffusers): `unet.PATH.lora_A.weight`, alpha in the file's metadata. kohya's (ComfyUI, A1111, Forge):
`lora_unet_PATH_WITH_UNDERSCORES.lora_down.weight`, `.lora_up.weight` and `.alpha`; readers scale by alpha / rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.networks.lora import Adapted

__all__ = ["kohya_tensors", "peft_config", "peft_tensors"]

NETWORK = "net.model."  # where a text-to-image denoiser keeps diffusers' network


def peft_tensors(adapted: Adapted, dtype: torch.dtype) -> dict[str, Tensor]:
    """A and B by diffusers' layer names, as `save_lora_weights` takes them."""
    tensors = {}
    for path, adapter in _layers(adapted):
        tensors[f"{path}.lora_A.weight"] = adapter.down.detach().to("cpu", dtype)
        tensors[f"{path}.lora_B.weight"] = adapter.up.detach().to("cpu", dtype)
    return tensors


def peft_config(adapted: Adapted) -> dict[str, Any]:
    """Return what PEFT reads besides the tensors: without alpha it would take the rank for it."""
    return {
        "r": adapted.spec.rank,
        "lora_alpha": adapted.spec.alpha,
        "target_modules": sorted(path for path, _ in _layers(adapted)),
        "init_lora_weights": True,
    }


def kohya_tensors(adapted: Adapted, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same as kohya's trainers write them, with the true alpha."""
    tensors = {}
    for path, adapter in _layers(adapted):
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = adapter.down.detach().to("cpu", dtype).contiguous()
        tensors[f"{name}.lora_up.weight"] = adapter.up.detach().to("cpu", dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(adapted.spec.alpha), dtype=dtype)
    return tensors


def _layers(adapted: Adapted) -> list[tuple[str, Any]]:
    return [(path.removeprefix(NETWORK), adapter) for path, adapter in adapted.adapters().items()]
