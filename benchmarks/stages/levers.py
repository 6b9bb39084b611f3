"""Possible accelerations, each measured alone before anything is built on it."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.stages.bench import Bench
from benchmarks.stages.training import Cycle, built
from fewstep.teachers import NativeTeacher

__all__ = ["attention", "convolutions", "graph", "optimizer", "sdxl"]


def attention(bench: Bench) -> None:
    """Kernels of attention at SDXL's shapes, forward and backward: 4,096 tokens on themselves, and on 77 of text."""
    tokens = 64 if bench.tiny else 4096
    for name, keys in (("on itself", tokens), ("on 77 of text", 77)):
        q, k, v = (
            torch.randn(2, 10, length, 64, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
            for length in (tokens, keys, keys)
        )
        times = {}
        for backend in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ):

            def work(q=q, k=k, v=v) -> None:
                F.scaled_dot_product_attention(q, k, v).sum().backward()

            try:
                with sdpa_kernel(backend):
                    times[backend.name.lower()] = 1000 * bench.seconds(work)
            except RuntimeError as error:  # this card, or this torch, has no such kernel
                bench.note(f"{backend.name.lower()}: {str(error).splitlines()[0]}", f"attention {name}")
        times["torch's choice"] = 1000 * bench.seconds(work)
        bench.report("ms", times, f"attention {name}")


def convolutions(bench: Bench) -> None:
    """SDXL's 3 x 3 convolutions in bf16, forward and backward: order of memory, and the library's search for kernels."""
    for channels, side in ((32, 8), (64, 4)) if bench.tiny else ((320, 128), (640, 64), (1280, 32)):
        times = {}
        for order in (torch.contiguous_format, torch.channels_last):
            for search in (False, True):
                layer = torch.nn.Conv2d(channels, channels, 3, padding=1).to(bench.device, torch.bfloat16)
                layer = layer.to(memory_format=order)
                x = torch.randn(2, channels, side, side, device=bench.device, dtype=torch.bfloat16)
                x = x.contiguous(memory_format=order).requires_grad_()
                with torch.backends.cudnn.flags(enabled=True, benchmark=search):
                    took = bench.seconds(lambda layer=layer, x=x: layer(x).sum().backward())
                times[f"{str(order).removeprefix('torch.')}{', searched' if search else ''}"] = 1000 * took
        bench.report("ms", times, f"convolution of {channels} channels, {side} x {side}")


def optimizer(bench: Bench) -> None:
    """AdamW and the average on 200 million weights in a thousand tensors."""
    sizes = [2_000] * 10 if bench.tiny else [200_000] * 1000
    weights = [torch.nn.Parameter(torch.randn(size, device=bench.device)) for size in sizes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    times = {}
    for name, options in (("fused", {"fused": True}), ("foreach", {"foreach": True})):
        adam = torch.optim.AdamW(weights, lr=1e-5, **options)
        times[f"AdamW, {name}"] = 1000 * bench.seconds(adam.step)
    average = [weight.detach().clone() for weight in weights]
    values = [weight.detach() for weight in weights]
    times["average, foreach"] = 1000 * bench.seconds(lambda: torch._foreach_lerp_(average, values, 0.01))
    times["norm of the gradients"] = 1000 * bench.seconds(
        lambda: torch.nn.utils.get_total_norm([weight.grad for weight in weights])
    )
    bench.report("ms", times)


def graph(bench: Bench) -> None:
    """A forward of the digits' network: as it is, and replayed as a CUDA graph."""
    teacher = NativeTeacher(path="digits").load()
    denoiser = copy.deepcopy(teacher.denoiser).to(bench.device)
    x, t = (
        torch.randn(64, *teacher.shape).to(bench.device),
        torch.full((64,), 0.5, dtype=torch.float64).to(bench.device),
    )
    cond = {key: value.to(bench.device) for key, value in teacher.conditioner.draw(64).items()}
    with torch.no_grad():
        times = {"as it is": 1000 * bench.seconds(lambda: denoiser(x, t, **cond))}
        if bench.cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    denoiser(x, t, **cond)
            torch.cuda.current_stream().wait_stream(side)
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                denoiser(x, t, **cond)
            times["replayed"] = 1000 * bench.seconds(recorded.replay)
    bench.report("ms", times)


def sdxl(bench: Bench) -> None:
    """An iteration of SDXL's LoRA: as shipped, with the search for convolutions, with channels last as well."""
    run, task = built(bench, "sdxl", "micro-batch 1")
    cycle = Cycle(bench, run, task)
    cycle.warm()
    bench.found("s an iteration", "sdxl LoRA", as_it_is=cycle.seconds())
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        cycle.warm()
        bench.found("s an iteration", "sdxl LoRA", kernels_searched=cycle.seconds())
        task.teacher.denoiser.to(memory_format=torch.channels_last)
        cycle.warm()
        bench.found("s an iteration", "sdxl LoRA", and_channels_last=cycle.seconds())
    finally:
        torch.backends.cudnn.benchmark = before
