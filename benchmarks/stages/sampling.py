"""Images a second of few-step students, without the decoder: fewstep beside a loop that does only what it must."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.stages.bench import Bench
from benchmarks.stages.networks import random_teacher
from fewstep.diffusion.generator import Generator
from fewstep.students.sample import FewStep
from fewstep.teachers import Teacher

__all__ = ["sdxl"]

TIMESTEPS = {1: [399], 4: [999, 749, 499, 249]}  # DMD2's


def sdxl(bench: Bench) -> None:
    """One step and four, one sample at a time and four; bf16 weights, then float32 ones under autocast."""
    teacher = random_teacher("sdxl", bench.tiny, bench.device, torch.bfloat16)
    for count in (1, 4):
        cond = {key: value.to(bench.device) for key, value in teacher.conditioner.draw(count).items()}
        for steps, timesteps in TIMESTEPS.items():
            generator = Generator(teacher.denoiser, [t / 999 for t in timesteps])
            name = f"SDXL at 1024 x 1024, {steps} step(s), {count} at a time"
            with torch.no_grad():
                bare = bench.seconds(lambda c=cond, t=timesteps, n=count: _bare(teacher, t, n, c), 4, 1)
                ours = bench.seconds(
                    lambda g=generator, c=cond, n=count: FewStep(g)(range(n), teacher.shape, **c), 4, 1
                )
            bench.report("images/s", {"fewstep": count / ours, "a bare loop": count / bare}, name)
    wide = Generator(teacher.start().requires_grad_(False).eval(), [t / 999 for t in TIMESTEPS[4]])
    with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16):
        ours = bench.seconds(lambda: FewStep(wide)(range(4), teacher.shape, **cond), 2, 1)
    bench.report(
        "images/s", {"float32 weights under autocast": 4 / ours}, "SDXL at 1024 x 1024, 4 step(s), 4 at a time"
    )


def _bare(teacher: Teacher, timesteps: list[int], count: int, cond: dict[str, Tensor]) -> Tensor:
    """The library's network called as its own documentation does, x0 from eps, fresh noise between steps."""
    network, device = teacher.denoiser.net.model, teacher.denoiser.net.model.device
    alphas = torch.tensor(teacher.denoiser.schedule.alphas_cumprod, device=device)
    text, added = cond["text"].bfloat16(), {"text_embeds": cond["pooled"].bfloat16(), "time_ids": cond["time_ids"]}
    x = torch.randn(count, *teacher.shape, device=device)
    for number, step in enumerate(timesteps):
        alpha, sigma = alphas[step].sqrt(), (1 - alphas[step]).sqrt()
        if number:
            x = alpha * x + sigma * torch.randn_like(x)
        eps = network(
            x.bfloat16(), step, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
        )[0]  # fmt: skip
        x = ((x - sigma * eps.float()) / alpha).float()
    return x
