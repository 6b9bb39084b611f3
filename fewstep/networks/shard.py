"""Splitting a network over processes with PyTorch's FSDP2 (`fully_shard`): a block's weights are whole only while it computes."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from fewstep.diffusion.denoiser import Denoiser
from fewstep.networks import diffusers_net, recompute
from fewstep.system.console import console

__all__ = ["shard", "units"]


def shard(module: nn.Module, mesh: DeviceMesh, bf16: bool = False, read: str = "") -> int:
    """Split every block of `module`, and what lies outside of blocks, over the processes of a mesh, in place.

    Parameters become DTensors, their gradients means over all processes. Values and gradients stay those of the whole network
    up to the order of sums. Anything that runs the module must run it on all processes alike.

    Args:
        module: what is called, such as a denoiser; already with gradient checkpointing, if it is to have it.
        mesh: of one dimension (shard) or two (replicate, shard).
        bf16: send and compute with bfloat16 weights; gradients are summed in float32.
        read: path of a layer that a GAN head reads, whose backward may begin there: a block around it is no unit of its own, but
            stays whole until the backward is done.

    Returns:
        The number of units.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # noise levels are float64, and autocast casts what layers take
    )
    for network in module.modules():
        if isinstance(network, diffusers_net.DiffusersNet):
            network.dtype = network.model.dtype  # of the weights at rest, which may travel as bfloat16
    layer = module.get_submodule(read) if read else None
    blocks = [part for part in units(module) if layer is None or part is layer or layer not in set(part.modules())]
    parts = [*reversed(blocks), module]  # inner ones first
    if not blocks and mesh.get_rank() == 0 and isinstance(module, Denoiser):
        console.print(
            f"train.mesh.shard: {type(getattr(module, 'net', module)).__name__} has no blocks that are known here, so that it is split "
            "at rest but whole in each process while it computes"
        )
    for part in parts:
        # what lies outside of blocks stays whole from a forward to its backward, which may begin at a block (GAN heads)
        fully_shard(part, mesh=mesh, reshard_after_forward=part is not module, mp_policy=policy)
    return len(parts)


def units(module: nn.Module) -> list[nn.Module]:
    """The blocks of `module` whose weights come and go together; some lie within others."""
    names = {  # the library says which of its modules belong together
        name
        for network in module.modules()
        if isinstance(network, diffusers_net.DiffusersNet)
        for name in network.model._no_split_modules or ()
    }
    return [
        part
        for part in module.modules()
        if part is not module and (isinstance(part, recompute.BLOCKS) or type(part).__name__ in names)
    ]
