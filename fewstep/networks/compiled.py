"""`torch.compile` by block: small graphs, few recompilations, and hooks on whole blocks (GAN heads, FSDP) stay outside."""

from __future__ import annotations

import torch
from torch import nn

from fewstep.networks.lora import Adapted
from fewstep.networks.shard import units
from fewstep.system.errors import SettingsError

__all__ = ["compile_blocks"]

# Each kind of block is compiled once a shape and once for each way it is run: with and without gradients, for its weights
# or for its inputs alone. The library gives up after eight, and would go on uncompiled.
VARIANTS = 256


def compile_blocks(module: nn.Module, read: str = "", backend: str = "inductor") -> int:
    """Compile the forward of each block of `module` that has no blocks inside, in place, at its first run.

    Weights, their names and hooks on blocks stay as they are; values change by rounding. To be called before gradient
    checkpointing and before splitting, on networks that are not copied afterwards.

    Args:
        module: such as a denoiser.
        read: path of a layer that a GAN head reads: a block around it stays as it is, for its hook would be lost.
        backend: of torch.compile.

    Returns:
        The number of blocks.

    Raises:
        SettingsError: low-rank adapters act by hooks within blocks; or the network has weights, but no block that is known here.
    """
    if any(isinstance(part, Adapted) for part in module.modules()):
        raise SettingsError(
            "train.compile does not go with adapters (lora), which act within blocks: leave one of them out"
        )
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    layer = module.get_submodule(read) if read else None
    blocks = set(units(module))
    inner = [
        block
        for block in blocks
        if not any(part in blocks for part in block.modules() if part is not block)
        and (layer is None or layer is block or layer not in set(block.modules()))
    ]
    if not inner and any(True for _ in module.parameters()):
        raise SettingsError(
            f"train.compile must find blocks to compile, got {type(getattr(module, 'net', module)).__name__}, which has none that is "
            "known. Try: leave it out"
        )
    for block in inner:
        block.forward = torch.compile(block.forward, backend=backend)
    return len(inner)
