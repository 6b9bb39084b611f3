"""The card, and what no program on it can exceed."""

from __future__ import annotations

import subprocess

import torch

from benchmarks.stages.bench import Bench
from fewstep.system.device import training_kernels

__all__ = ["card", "copies", "products"]


def card(bench: Bench) -> None:
    """Name, memory, driver, libraries."""
    bench.note(f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    if not bench.cuda:
        return
    about = torch.cuda.get_device_properties(bench.device)
    bench.found("GiB", memory=about.total_memory / 2**30)
    bench.note(
        f"{about.name}, compute capability {about.major}.{about.minor}, {about.multi_processor_count} multiprocessors"
    )
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10,
        )  # fmt: skip
        bench.note(f"driver, power limit, clock: {told.stdout.strip() or told.stderr.strip()}")
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        bench.note(f"driver unknown ({type(error).__name__}: nvidia-smi)")


def products(bench: Bench) -> None:
    """Operations a second of a large matrix product in each precision."""
    side = 256 if bench.tiny else 8192
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("fp32", torch.float32, False),
    ):  # fmt: skip
        a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
        with training_kernels(bench.device, False, tf32):
            seconds = bench.seconds(lambda a=a, b=b: a @ b)
        bench.report("TFLOP/s", {name: 2 * side**3 / seconds / 1e12})


def copies(bench: Bench) -> None:
    """Bandwidth within the card's memory (bytes read and written) and from and to the host, pinned and not."""
    size = 2**20 if bench.tiny else 2**30
    here, there = (torch.empty(size, dtype=torch.uint8, device=bench.device) for _ in range(2))
    bench.report("GB/s", {"within the device": 2 * size / bench.seconds(lambda: there.copy_(here)) / 1e9})
    for name, pinned in (("pinned", bench.cuda), ("pageable", False)):
        host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        given = bench.seconds(lambda host=host: here.copy_(host, non_blocking=True), 3, 1)
        fetched = bench.seconds(lambda host=host: host.copy_(here, non_blocking=True), 3, 1)
        bench.report("GB/s", {f"to the device, {name}": size / given / 1e9, f"from it, {name}": size / fetched / 1e9})
