"""Weights at rest as autocast would round them anyway."""

from __future__ import annotations

import torch
from torch import nn

from fewstep.networks.diffusers_net import DiffusersNet

__all__ = ["narrow"]


def narrow(module: nn.Module) -> None:
    """Round a network's matrices and kernels to bfloat16, in place, where it runs under bfloat16 autocast alone.

    Its outputs stay the same bits, and so do gradients of one backward pass; those of several add up in bfloat16. Biases and
    scales, which are small, and embeddings, whose rows are read as they are, stay float32.
    """
    for part in module.modules():
        if isinstance(part, DiffusersNet):
            part.dtype = torch.float32  # of what it takes: autocast casts for each layer
        weight = getattr(part, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim >= 2 and not isinstance(part, nn.Embedding):
            weight.data = weight.data.bfloat16()
