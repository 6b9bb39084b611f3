"""Schedulers of diffusers that call a student at its own times, given only the number of steps."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.diffusion.noise import Discrete, RectifiedFlow
from fewstep.students.export.facts import Facts

__all__ = ["CUSTOM", "scheduler_of", "stretched"]

CUSTOM = "stored_scheduler"  # file with the class of a custom scheduler, in the scheduler's folder
TABLE = (  # settings of a scheduler's noise table; its other settings belong to its own sampler
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type",
)  # fmt: skip


def scheduler_of(facts: Facts, teachers: Any) -> Any:
    """Make the scheduler of an exported student.

    It is one of diffusers' own if it can be configured to use the student's times, else one of `stored_scheduler`, whose
    configuration stores them.

    Args:
        facts: the student's facts.
        teachers: the pipeline's own scheduler, whose noise table is kept.
    """
    if isinstance(facts.schedule, RectifiedFlow):
        return _flow(facts, facts.schedule, int(teachers.config.get("num_train_timesteps", 1000)))
    assert isinstance(facts.schedule, Discrete), "a latent model has a table or is a flow"
    return _lcm(facts, facts.schedule, {key: teachers.config[key] for key in TABLE if key in teachers.config})


def _lcm(facts: Facts, schedule: Discrete, table: dict[str, Any]) -> Any:
    """`LCMScheduler` walks multiples of 1000 // original_inference_steps, less one. Its default of 50 would visit 999,
    759, 499, 259; with 4 it is DMD2's 999, 749, 499, 249."""
    from diffusers import LCMScheduler

    from fewstep.students.export.stored_scheduler import StoredTimestepsScheduler

    made = LCMScheduler(**table, original_inference_steps=facts.steps, clip_sample=False, steps_offset=1)
    assert torch.allclose(made.alphas_cumprod.double(), torch.tensor(schedule.alphas_cumprod).double(), atol=1e-6)
    made.set_timesteps(facts.steps)
    if made.timesteps.tolist() == facts.timesteps:
        return made
    return StoredTimestepsScheduler(**table, student_timesteps=tuple(facts.timesteps))


def _flow(facts: Facts, schedule: RectifiedFlow, timesteps: int) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from fewstep.students.export.stored_scheduler import StoredSigmasScheduler

    equal = all(abs(time - (1 - step / facts.steps)) < 1e-6 for step, time in enumerate(facts.times))
    if equal:
        settings: dict[str, Any] = {"shift": schedule.shift}
        if facts.steps > 1 and not facts.family.own_sigmas:
            settings = stretched(schedule.shift, facts.steps, timesteps)
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=timesteps, stochastic_sampling=True, **settings)
    return StoredSigmasScheduler(num_train_timesteps=timesteps, shift=schedule.shift, student_sigmas=tuple(facts.times))


def stretched(shift: float, steps: int, timesteps: int = 1000) -> dict[str, float]:
    """Settings of FlowMatchEulerDiscreteScheduler for which `set_timesteps(steps)` uses the shifted 1, 1 - 1/K, ..., 1/K.

    By itself it goes down to its least level in K - 1 equal steps d, applies a shift s', and stretches 1 - u to end at
    `shift_terminal`: 1 - u_i is proportional to i / (s' / ((s' - 1) d) - i). The levels wanted are
    1 - u_i = i / (s K - (s - 1) i), proportional to i / (s K / (s - 1) - i). They are the same where the constants are.

    Args:
        shift: s.
        steps: K, at least 2.
        timesteps: of the scheduler's training, whose last is the least level.
    """
    last = 1 / steps
    end = shift * last / (1 + (shift - 1) * last)
    own = 1.0
    if shift != 1:
        for _ in range(100):  # d depends on s' a little; a contraction by about 1 / timesteps
            least = own / timesteps / (1 + (own - 1) / timesteps)
            ratio = shift * steps / ((shift - 1) * (steps - 1)) * (1 - least)
            own = ratio / (ratio - 1)
    return {"shift": own, "shift_terminal": end}
