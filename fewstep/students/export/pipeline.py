"""A student as a pipeline of the diffusers library: its folder loads and samples with no argument but the step count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.noise import Discrete, RectifiedFlow
from fewstep.networks import FAMILIES
from fewstep.students.student import Student
from fewstep.system.console import quiet

__all__ = ["flow_scheduler", "lcm_scheduler", "save_pipeline"]

TABLE = (  # what makes a scheduler's noise table; the rest of its configuration belongs to its own sampler
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type",
)  # fmt: skip


def lcm_scheduler(scheduler: Any, schedule: Discrete, steps: int) -> tuple[Any, list[int]]:
    """The scheduler that renoises as a few-step generator does, and the timesteps it visits in `steps` steps.

    `LCMScheduler` walks multiples of 1000 // original_inference_steps, less one. Its default of 50 would visit 999,
    759, 499, 259; with 4 it is DMD2's 999, 749, 499, 249.

    Args:
        scheduler: the teacher's, whose noise table is kept.
        schedule: the student's, which must be that table.
        steps: network calls of the student.
    """
    from diffusers import LCMScheduler

    table = {key: scheduler.config[key] for key in TABLE if key in scheduler.config}
    made = LCMScheduler(**table, original_inference_steps=steps, clip_sample=False, steps_offset=1)
    assert torch.allclose(made.alphas_cumprod.double(), torch.tensor(schedule.alphas_cumprod).double(), atol=1e-6)
    made.set_timesteps(steps)
    return made, made.timesteps.tolist()


def flow_scheduler(scheduler: Any, schedule: RectifiedFlow, steps: int) -> tuple[Any, list[float]]:
    """diffusers' renoising flow scheduler, and the normalised times that a pipeline visits in `steps` steps by itself.

    Args:
        scheduler: the teacher's.
        schedule: the student's, whose shift is stored as it is.
        steps: network calls of the student.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    made = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=scheduler.config.get("num_train_timesteps", 1000),
        shift=schedule.shift,
        stochastic_sampling=True,
    )
    made.set_timesteps(steps)
    sigmas = made.sigmas[:-1].double()
    return made, schedule.time(sigmas / (1 - sigmas)).tolist()


def save_pipeline(student: Student, weights: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> bool:
    """Write the pipeline; returns whether it visits the student's times by itself.

    Args:
        student: whose pipeline it is, opened with its `parts`. They become what is written.
        weights: of the network, by diffusers' names.
        folder: where to write.
        dtype: of all weights.
    """
    assert student.parts is not None, "a student without its pipeline"
    pipeline, schedule, times = student.parts, student.generator.denoiser.schedule, student.generator.times
    with quiet():
        getattr(pipeline, FAMILIES[student.net.model].component).load_state_dict(weights)
        if isinstance(schedule, RectifiedFlow):
            scheduler, visited = flow_scheduler(pipeline.scheduler, schedule, len(times))
        else:
            scheduler, steps = lcm_scheduler(pipeline.scheduler, student.table, len(times))
            visited = [step / (len(student.table.alphas_cumprod) - 1) for step in steps]
        pipeline.register_modules(scheduler=scheduler)
        pipeline.to(dtype=dtype).save_pretrained(folder, safe_serialization=True)
    for config in folder.glob("text_encoder*/config.json"):
        # diffusers loads its own parts in float32 unless told otherwise, transformers in what its configuration says:
        # with float16 there, a pipeline loaded without a dtype would stop at its first product
        settings = json.loads(config.read_text())
        config.write_text(json.dumps(settings | {"dtype": "float32"}, indent=2) + "\n")
    return all(abs(own - other) < 1e-6 for own, other in zip(times, visited, strict=True))
