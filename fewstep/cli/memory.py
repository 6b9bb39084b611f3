"""The message for a command that runs out of memory: what was asked for, and which settings need less. Imports no torch."""

from __future__ import annotations

import re

__all__ = ["out_of_memory"]

TRAINING = (
    "a smaller --train.micro-batch; --train.recompute-activations True or, for less memory and a third more work, "
    "--train.gradient-checkpointing True; --train.offload True. `fewstep plan RUN` predicts the memory of each without a GPU"
)
WAYS = {
    "distill": TRAINING,
    "pretrain": "a smaller --train.micro-batch; --train.gradient-checkpointing True",
    "bench": TRAINING,
    "pairs": "a smaller --batch",
    "prepare": "a smaller --batch",
    "sample": "a smaller --batch",
    "eval": "a smaller --batch",
}
# PyTorch's messages: `torch.OutOfMemoryError` of a GPU, and a RuntimeError of the CPU's allocator
ASKED = re.compile(r"(?:Tried to allocate|you tried to allocate) ([\d.]+ (?:[KMGT]iB|bytes))")


def out_of_memory(error: BaseException, command: str) -> str | None:
    """Explain an error if it is one of memory; None for others.

    Args:
        error: as raised by Python, by PyTorch's allocator for a GPU, or by the one for the CPU.
        command: name of the command, to say which of its settings need less.
    """
    text = str(error)
    on_gpu = type(error).__name__ in ("OutOfMemoryError", "AcceleratorError") and "out of memory" in text
    if not (on_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in text):
        return None
    asked = ASKED.search(text)
    total = re.search(r"total capacity of ([\d.]+ [KMGT]iB)", text)
    got = f"{asked[1]} more" if asked else "more"
    device = f"a GPU of {total[1]}" if total else "the GPU's memory" if on_gpu else "this machine's memory"
    way = f". Try: {WAYS[command]}" if command in WAYS else ""
    return f"the run must fit {device}, got a request for {got}{way}"
