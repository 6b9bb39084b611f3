"""The device and the precision of a run. Knows no model."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Precision", "hardware", "pick_device", "training_kernels", "use_bf16"]

Precision = Literal["auto", "bf16", "fp32", "tf32"]


def pick_device(name: str) -> torch.device:
    """Resolve `cpu`, `cuda`, ... or `auto` (this process's GPU if available).

    Raises:
        ValueError: no such device.
    """
    if name == "auto":
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"`device` must be auto, cpu or cuda, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` must be auto or cpu, because torch finds no GPU, got {name!r}")
    return device


def use_bf16(precision: Precision, device: torch.device) -> bool:
    """Return whether networks run under bf16 autocast; "auto" requires native bf16 hardware.

    A processor that emulates bf16 is many times slower than in float32 (LOG.md: 12 times on an AVX2 machine).
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # private names of torch; tests/system/test_device.py detects their removal
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


@contextmanager
def training_kernels(device: torch.device, bf16: bool, tf32: bool = False) -> Iterator[None]:
    """Choose the kernels of an update: fast in forward and backward, and with the requested precision.

    On a CPU in bf16 attention is explicit (unfused). The fused kernel's backward took two fifths of an update of a small UNet
    (LOG.md, 2026-11-26); in float32 the fused kernel is faster.

    Args:
        device: the networks' device.
        bf16: whether networks run under bf16 autocast.
        tf32: whether float32 products and convolutions may use TF32 on an NVIDIA GPU. PyTorch's default allows it only for
            convolutions; EDM's and SiD's programs turn it off, DMD2's turns it on.
    """
    if device.type != "cuda":
        with sdpa_kernel(SDPBackend.MATH) if bf16 else nullcontext():
            yield
        return
    cudnn, before = torch.backends.cudnn, torch.get_float32_matmul_precision()
    same = dict(enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with cudnn.flags(**same, allow_tf32=tf32):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def hardware(processes: int) -> str:
    """Name the hardware for results and model cards: the GPU, or the processor with processes x threads."""
    if torch.cuda.is_available():
        return f"{processes} x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()}, {processes} x {torch.get_num_threads()} thread(s)"
