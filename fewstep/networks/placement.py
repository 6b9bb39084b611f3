"""Placement of a network's blocks: recomputation, compilation, sharding, bfloat16 at rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fewstep.diffusion.denoiser import Denoiser
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.networks.base import Normalised
from fewstep.networks.blocks import blocks_of
from fewstep.networks.diffusers_net import DiffusersNet
from fewstep.networks.edm_layers import Conv
from fewstep.networks.lora import contexts
from fewstep.system.console import console
from fewstep.system.errors import SettingsError

__all__ = ["KEPT", "compile_blocks", "narrow", "normalise_weights", "recompute_blocks", "refuse_normalised", "shard"]

# costly operations, whose results are kept if only the operations between them are recomputed
KEPT = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "convolution", "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
    )
)  # fmt: skip

# A block is compiled once per shape and mode: with and without gradients, for its weights or only for its inputs. PyTorch
# stops after eight compilations and would continue uncompiled.
VARIANTS = 256


def recompute_blocks(module: nn.Module, between: bool = False) -> int:
    """Recompute each block's activations in the backward pass (gradient checkpointing; Chen et al. 2016, arXiv 1604.06174).

    Values, gradients and random draws stay the same. Without gradients nothing changes. Hooks on a block (such as those of GAN
    heads) see each forward once.

    Args:
        module: the module, such as a denoiser.
        between: also keep the results of convolutions, matrix products and attention, and recompute only norms, activations
            and dropout. Otherwise keep only the block's input.

    Returns:
        The number of blocks; 0 for a denoiser without weights.

    Raises:
        SettingsError: the network has weights, but no blocks; or, in its first forward with gradients, a block updates buffers
            (running statistics), which recomputation would update twice.
    """
    setting = "train.recompute_activations" if between else "train.gradient_checkpointing"
    blocks = _blocks(module, setting)
    for block in blocks:
        _watch(block, f"{setting} must find blocks that may run twice, got {_name(module)}")
        _around(block, _recomputed, _keeping if between else contexts)
    return len(blocks)


def _recomputed(pair: Callable[[], Any], forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=pair, **options)


def _keeping() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for `torch.utils.checkpoint`: keep the results of costly operations; recompute with the first forward's adapter."""
    first, again = create_selective_checkpoint_contexts(_policy)
    return first, _both(again, contexts()[1])


def _policy(_context: Any, operation: Any, *_args: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _both(outer: AbstractContextManager[None], inner: AbstractContextManager[None]) -> Iterator[None]:
    with outer, inner:
        yield


def compile_blocks(module: nn.Module, read: str = "", backend: str = "inductor") -> int:
    """Compile the forward of each block with `torch.compile`, in place, at its first run.

    By block: small graphs, few recompilations, and hooks on whole blocks (GAN heads, FSDP) stay outside. Weights, their names
    and hooks on blocks stay as they are; values change by rounding. Adapters become part of the graphs: one for each adapter that
    runs, and one for none. Call it before gradient checkpointing and before sharding, on networks that are not copied
    afterwards.

    Args:
        module: such as a denoiser; of adapters the network they act on.
        read: path of a layer that a GAN head reads: a block around it is not compiled, for its hook would be lost.
        backend: of torch.compile.

    Returns:
        The number of compiled blocks.

    Raises:
        SettingsError: the network has weights, but no blocks; or, in its first forward, PyTorch cannot compile a block.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    _blocks(module, "train.compile")
    blocks = _units(module, read)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend)
        _around(block, _compiled, f"{type(block).__name__} in {_name(module)}")
    return len(blocks)


def _compiled(name: str, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return forward(*args, **options)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).split("\n\n")[0]  # the rest is advice for debugging PyTorch
        raise SettingsError(
            f"train.compile must get blocks that PyTorch can compile, got {name}: {' '.join(reason.split())}. "
            "Try: leave it out"
        ) from error


def shard(module: nn.Module, mesh: DeviceMesh, bf16: bool = False, read: str = "") -> int:
    """Split every block, and the rest of the module, over the processes of a mesh with PyTorch's FSDP2, in place.

    A block's weights are whole only while it computes. Parameters become DTensors; their gradients are means over all
    processes. Values and gradients equal those of the whole network up to the order of sums. All processes must run the module
    alike.

    Args:
        module: the module that is called, such as a denoiser; with gradient checkpointing already applied, if any.
        mesh: mesh of one dimension (shard) or two (replicate, shard).
        bf16: send and compute with bfloat16 weights; gradients are summed in float32.
        read: path of the layer that a GAN head reads. The backward may begin there, so a block around it is not a separate
            unit and stays whole until the backward is done.

    Returns:
        The number of units.

    Raises:
        SettingsError: two units share a weight; or, in its first forward with gradients, a block updates buffers (running
            statistics), which would differ between processes, or hides its output from PyTorch in an object.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # noise levels are float64; autocast casts the layers' inputs
    )
    for network in module.modules():
        if isinstance(network, DiffusersNet):
            network.dtype = network.model.dtype  # of the weights at rest, which may travel as bfloat16
    blocks = _units(module, read)
    _own_weights(module, blocks)
    if not blocks and mesh.get_rank() == 0 and isinstance(module, Denoiser):
        console.print(
            f"train.mesh.shard: {_name(module)} has no blocks, so that it is split at rest but whole in each process while it computes"
        )
    for block in blocks:
        _watch(block, f"train.mesh.shard must find blocks that stay equal in all processes, got {_name(module)}")
        _around(block, _visible, f"{type(block).__name__} in {_name(module)}")
    for part in [*blocks, module]:
        # the rest stays whole from a forward to its backward, which may begin at a block (GAN heads)
        fully_shard(part, mesh=mesh, reshard_after_forward=part is not module, mp_policy=policy)
    return len(blocks) + 1


def _own_weights(module: nn.Module, blocks: Sequence[nn.Module]) -> None:
    inside = {part for block in blocks for part in block.modules()}
    rest = {value for part in module.modules() if part not in inside for value in part.parameters(recurse=False)}
    groups = [*(set(block.parameters()) for block in blocks), rest]
    if sum(map(len, groups)) > len(set().union(*groups)):
        raise SettingsError(
            f"train.mesh.shard must find each weight in one block, got {_name(module)}, in which blocks share weights. Try: "
            "train.mesh.shard 1"
        )


def _visible(name: str, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run a block and check that FSDP can hook the tensors of its output, to prepare its backward."""
    output = forward(*args, **options)
    for leaf in tree_leaves(output):
        if not isinstance(leaf, Tensor | bool | int | float | str | None):
            raise SettingsError(
                f"train.mesh.shard must get blocks that return tensors, alone or in tuples, lists and dicts, got {name}, which "
                f"returns a {type(leaf).__name__}. Try: train.mesh.shard 1"
            )
    return output


def narrow(module: nn.Module) -> None:
    """Round the weights of linear layers and convolutions to bfloat16, in place, as autocast would anyway.

    For networks that run only under bfloat16 autocast. Their outputs stay bit-identical, as do gradients of one backward pass;
    gradients of several passes add up in bfloat16. Biases and scales (small), embeddings (read without a cast) and weights of
    layers that autocast does not cover stay float32.
    """
    for part in module.modules():
        if isinstance(part, DiffusersNet):
            part.dtype = torch.float32  # of what it takes: autocast casts for each layer
        if isinstance(part, nn.Linear | nn.modules.conv._ConvNd | Conv) and part.weight is not None:
            part.weight.data = part.weight.data.bfloat16()


def normalise_weights(module: nn.Module) -> None:
    """Put the weights of `Normalised` layers that are trained back to unit norm (EDM2, eq. 66)."""
    for part in module.modules():
        if isinstance(part, Normalised) and any(value.requires_grad for value in part.parameters()):
            part.normalise_()


def refuse_normalised(modules: Sequence[nn.Module]) -> None:
    """Raise SettingsError for `Normalised` layers, whose master copies in host memory would not be normalised."""
    if any(isinstance(part, Normalised) for module in modules for part in module.modules()):
        raise SettingsError(
            "`train.offload` must be false for EDM2's networks, whose weights are normalised after each step on the device, got true. "
            "Try: train.mesh.shard, or train.gradient_checkpointing"
        )


def _units(module: nn.Module, read: str = "") -> list[nn.Module]:
    """Blocks, without the one that contains the layer `read`."""
    layer = module.get_submodule(read) if read else None
    return [
        block for block in blocks_of(module) if layer is None or layer is block or layer not in set(block.modules())
    ]


def _blocks(module: nn.Module, setting: str) -> list[nn.Module]:
    blocks = blocks_of(module)
    if not blocks and any(True for _ in module.parameters()):
        raise SettingsError(
            f"{setting} must find blocks in the network, got {_name(module)}, which has none: no members of a ModuleList with two "
            "layers or more. Try: leave it out, or let the class name its blocks (fewstep.networks.Blocked)"
        )
    return blocks


def _name(module: nn.Module) -> str:
    network = module.net if isinstance(module, Preconditioned) else module
    return type(network.model if isinstance(network, DiffusersNet) else network).__name__


def _around(block: nn.Module, wrapper: Callable[..., Any], *arguments: Any) -> None:
    """Run a block's forward as `wrapper(*arguments, forward, *inputs)`."""
    block.forward = partial(wrapper, *arguments, block.forward)


def _watch(block: nn.Module, wanted: str) -> None:
    """Refuse the block at its first forward with gradients if that updates a buffer."""
    holders = [part for part in block.modules() if any(True for _ in part.buffers(recurse=False))]
    if holders:
        _around(block, _unchanged, holders, wanted)


def _unchanged(holders: list[nn.Module], wanted: str, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    before = [(part, name, value._version) for part in holders for name, value in part.named_buffers(recurse=False)]
    output = forward(*args, **options)
    for part, name, version in before:
        if part.get_buffer(name)._version != version:
            raise SettingsError(
                f"{wanted}, whose {type(part).__name__} updates its buffer {name} in each forward. Try: layers without running "
                "statistics (GroupNorm), or leave it out"
            )
    return output
