"""Memory for computing again in the backward pass (Chen et al. 2016, arXiv 1604.06174): whole blocks, or what is cheap in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fewstep.networks import diffusers_net, dit, edm, mlp, unet
from fewstep.networks.lora import contexts
from fewstep.system.errors import SettingsError

__all__ = ["KEPT", "recompute_blocks"]


BLOCKS = (dit.Block, edm.Block, mlp.MLPBlock, unet.Attention, unet.ResBlock)


# Dear operations, whose results are kept where only what lies between them is computed again.
KEPT = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "convolution", "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
    )
)  # fmt: skip


def recompute_blocks(module: nn.Module, between: bool = False) -> int:
    """Let each block in `module` keep little of a forward and compute again what the backward pass needs.

    Values, gradients and random draws stay the same. Without gradients nothing changes. Hooks on a block (GAN heads
    read by them) see each forward once.

    Args:
        module: such as a denoiser.
        between: keep the results of convolutions, matrix products and attention as well as the block's input: only norms,
            activations and dropout are computed again. Otherwise the block's input alone is kept.

    Returns:
        The number of blocks; 0 for a denoiser without weights, which has nothing to save.

    Raises:
        SettingsError: the network has weights, but no block that is known here.
    """
    again = _between if between else _recomputed
    blocks = [block for block in module.modules() if isinstance(block, BLOCKS)]
    for block in blocks:
        block.forward = partial(again, block.forward)
    for network in (m.model for m in module.modules() if isinstance(m, diffusers_net.DiffusersNet)):
        # the library knows its own blocks
        network.enable_gradient_checkpointing(again)
        blocks += [block for block in network.modules() if getattr(block, "gradient_checkpointing", False)]
    if not blocks and any(True for _ in module.parameters()):
        raise SettingsError(
            f"train.{'recompute_activations' if between else 'gradient_checkpointing'} must find blocks to compute again, got {type(getattr(module, 'net', module)).__name__}, which "
            f"has none of {', '.join(block.__name__ for block in BLOCKS)}. Try: leave it out"
        )
    return len(blocks)


def _recomputed(forward: Any, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts)


def _between(forward: Any, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_keeping)


def _keeping() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`: keep the results of dear operations, and run again with the adapter of the first forward."""
    first, again = create_selective_checkpoint_contexts(_policy)
    return first, _both(again, contexts()[1])


def _policy(_context: Any, operation: Any, *_args: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(outer: AbstractContextManager[None], inner: AbstractContextManager[None]) -> Iterator[None]:
    with outer, inner:
        yield
