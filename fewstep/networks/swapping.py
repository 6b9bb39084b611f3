"""Block swapping: blocks of a frozen network that stay in host memory and are copied to the device while they run.

A block's weights are on the device only during its forward; the autograd graph keeps what the backward pass needs. With
gradient checkpointing that is one block at a time, whose forward and copy are repeated just before its backward. The next
block is copied meanwhile, on a separate stream. kohya's programs do the same for LoRA training ("blocks to swap").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.networks.blocks import blocks_of
from fewstep.system.errors import SettingsError

__all__ = ["Swap", "swap_blocks"]

Place = tuple[dict[str, Any], str]  # parameters or buffers of a layer, and a name among them


def swap_blocks(network: nn.Module, count: int, device: torch.device) -> Swap:
    """Keep `count` blocks of a frozen network in host memory, evenly spread over its forward.

    Call it before gradient checkpointing. Afterwards the blocks ignore `network.to(...)`.

    Args:
        network: the network, in host memory.
        count: number of blocks; at least 1.
        device: the compute device.

    Raises:
        SettingsError: the network has fewer blocks.
    """
    blocks = blocks_of(network)
    if count > len(blocks):
        raise SettingsError(
            f"`train.swap_blocks` must be at most the {len(blocks)} blocks of the frozen network, got {count}. Try: "
            f"{len(blocks)}"
        )
    return Swap([blocks[number * len(blocks) // count] for number in range(count)], device)


class Swap:
    """Blocks in host memory.

    Args:
        blocks: the blocks, in the order of the forward.
        device: the compute device.

    Attributes:
        size: bytes of all blocks.
        moved: bytes copied to the device so far.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.device, self.moved = device, 0
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._blocks = [_places(block) for block in blocks]
        self._ahead: tuple[int, list[Tensor], Any] | None = None  # block, its tensors on their way, their event
        for places in self._blocks:
            for store, name in places:
                assert not store[name].requires_grad, "a frozen network"
                if self._cuda:
                    store[name].data = store[name].data.pin_memory()
        self.size = sum(store[name].nbytes for places in self._blocks for store, name in places)
        for number, block in enumerate(blocks):
            block._apply = partial(_stay, block)  # type: ignore[method-assign]
            block.forward = partial(self._run, number, block.forward)

    def _run(self, number: int, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
        values = self._take(number)
        # a backward pass recomputes the blocks from the last to the first
        following = number + (1 if torch._C._current_graph_task_id() == -1 else -1)
        if 0 <= following < len(self._blocks):
            self._ahead = (following, *self._fetch(following))
        places = self._blocks[number]
        kept = [store[name] for store, name in places]
        try:
            _put(places, values)
            return forward(*args, **options)
        finally:
            _put(places, kept)

    def _take(self, number: int) -> list[Tensor]:
        """Get a block's tensors on the device, ready for the current stream."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and self._cuda:
            torch.cuda.current_stream(self.device).wait_event(ahead[2])  # also of those that are dropped now
        if ahead is not None and ahead[0] == number:
            return ahead[1]
        values, event = self._fetch(number)
        if self._cuda:
            torch.cuda.current_stream(self.device).wait_event(event)
        return values

    def _fetch(self, number: int) -> tuple[list[Tensor], Any]:
        """Start copying a block's tensors. The memory belongs to the current stream, which frees it after use."""
        sources = [store[name].detach() for store, name in self._blocks[number]]
        arriving = [torch.empty_like(source, device=self.device) for source in sources]
        self.moved += sum(source.nbytes for source in sources)
        if self._stream is None:
            for value, source in zip(arriving, sources, strict=True):
                value.copy_(source)
            return arriving, None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for value, source in zip(arriving, sources, strict=True):
                value.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return arriving, event


def _stay(block: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Replacement of `nn.Module._apply`, which moves and casts modules."""
    return block


def _places(block: nn.Module) -> list[Place]:
    return [
        (store, name)
        for part in block.modules()
        for store in (part._parameters, part._buffers)
        for name, value in store.items()
        if value is not None
    ]


def _put(places: Sequence[Place], values: Sequence[Tensor]) -> None:
    for (store, name), value in zip(places, values, strict=True):
        store[name] = value
