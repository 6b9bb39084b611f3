"""The cases of `benchmarks/gpu.py`, in order of worth. Imports no torch: the command reads this list before any worker runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.stages.variants import VARIANTS

if TYPE_CHECKING:
    from benchmarks.stages.bench import Bench

__all__ = ["CASES", "Case", "setup"]


class Case(NamedTuple):
    """Something to measure.

    Attributes:
        stage: that it belongs to.
        name: within the stage.
        seconds: it may take.
        function: `module:function` of this package, called with a `Bench` and the arguments.
        beside: needs no GPU, and runs beside the others.
    """

    stage: str
    name: str
    seconds: int
    function: str
    arguments: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    beside: bool = False


def setup(folder: Path, cpu: bool, tiny: bool, send: Callable[[dict], None]) -> Bench:
    """Return the arguments of the cases.

    Args:
        folder: of the findings.
        cpu: do not use a GPU.
        tiny: tiny networks.
        send: takes findings.
    """
    from benchmarks.stages.bench import Bench

    return Bench(folder, cpu, tiny, send)


LATE = (  # long, or the first to go, for what they tell
    "micro-batch 1, Adam in 8 bits", "sdxl/dmd2-4step, all weights, offloaded", "micro-batch 1, int8 base",
    "micro-batch 1, NF4 base", "micro-batch 1, 40 blocks at the host",
)  # fmt: skip


def _trained(late: bool) -> list[Case]:
    return [
        Case(stage, name, variant["seconds"], "training:measured", {"stage": stage, "name": name})
        for (stage, name), variant in VARIANTS.items()
        if (name in LATE) is late
    ]


CASES = [
    Case("card", "card", 20, "card:card"),
    Case("card", "product 8192 x 8192 x 8192", 20, "card:products"),
    Case("card", "copies", 20, "card:copies"),
    Case("right", "networks", 40, "right:networks"),
    Case("right", "losses", 40, "right:losses"),
    Case("right", "three updates", 60, "right:updates"),
    Case("right", "adapters on one backbone, recomputing blocks", 60, "right:adapters"),
    Case("right", "resumed", 40, "right:resumed"),
    Case("right", "offloaded", 40, "right:offloaded"),
    Case("right", "blocks at the host", 40, "right:swapped"),
    Case("right", "FSDP2 on a mesh of one", 40, "right:split"),
    Case("right", "compiled block by block", 90, "right:compiled"),
    *_trained(late=False),
    Case("where", "sdxl LoRA", 60, "where:sdxl"),
    Case("where", "ImageNet-64 ADM", 60, "where:adm"),
    Case("sampling", "SDXL at 1024 x 1024", 60, "sampling:sdxl"),
    Case("levers", "attention in bf16", 30, "levers:attention"),
    Case("levers", "convolutions in bf16", 30, "levers:convolutions"),
    Case("levers", "optimizer and average", 30, "levers:optimizer"),
    Case("levers", "CUDA graph of a small network", 30, "levers:graph"),
    Case("levers", "sdxl LoRA", 60, "levers:sdxl"),
    *_trained(late=True),
    *(
        Case("fashion-mnist", f"{recipe}, seed {seed}", 300, "recipes:run", {"recipe": recipe, "seed": seed})
        for seed in range(3)
        for recipe in ("sid", "dmd2-no-gan", "dmd2-4step")
    ),
    *(
        Case(stage, f"{name}: plan", 120, "training:planned", {"stage": stage, "name": name}, beside=True)
        for stage, name in VARIANTS
    ),
]  # fmt: skip
