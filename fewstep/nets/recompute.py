"""Gradient checkpointing by block (Chen et al. 2016, arXiv 1604.06174): memory for a second forward of each block."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewstep.lora import contexts
from fewstep.nets import diffusers_net, dit, edm_unet, mlp, unet

__all__ = ["RecomputeError", "recompute_blocks"]


class RecomputeError(ValueError):
    """A network without blocks to compute again."""


BLOCKS = (dit.Block, edm_unet.Block, mlp.MLPBlock, unet.Attention, unet.ResBlock)


def recompute_blocks(module: nn.Module) -> int:
    """Let each block in `module` keep its input alone and compute again what the backward pass needs.

    Values, gradients and random draws stay the same. Without gradients nothing changes. Hooks on a block (GAN heads
    read by them) see each forward once.

    Returns:
        The number of blocks; 0 for a denoiser without weights, which has nothing to save.

    Raises:
        RecomputeError: the network has weights, but no block that is known here.
    """
    blocks = [block for block in module.modules() if isinstance(block, BLOCKS)]
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)
    for network in (m.model for m in module.modules() if isinstance(m, diffusers_net.DiffusersNet)):
        # the library knows its own blocks
        network.enable_gradient_checkpointing(_recomputed)
        blocks += [block for block in network.modules() if getattr(block, "gradient_checkpointing", False)]
    if not blocks and any(True for _ in module.parameters()):
        raise RecomputeError(
            f"train.gradient_checkpointing must find blocks to compute again, got {type(getattr(module, 'net', module)).__name__}, which "
            f"has none of {', '.join(block.__name__ for block in BLOCKS)}. Try: leave it out"
        )
    return len(blocks)


def _recomputed(forward: Any, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts)
