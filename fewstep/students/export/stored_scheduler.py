"""Schedulers that call a few-step student at its training times, which no scheduler of diffusers can store.

This file is in the scheduler's folder of an exported student: `from_pretrained(FOLDER, trust_remote_code=True)`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler
from diffusers.configuration_utils import register_to_config


def _check(given: int | None, stored: list[Any], name: str) -> None:
    if given != len(stored):
        raise ValueError(
            f"num_inference_steps must be {len(stored)}, got {given}: this student is called at {name} {list(stored)}"
        )


class StoredTimestepsScheduler(LCMScheduler):
    """LCMScheduler at fixed timesteps: the prediction of each call is renoised to the next."""

    @register_to_config
    def __init__(
        self,
        student_timesteps: tuple[int, ...] = (999,),
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
    ) -> None:
        super().__init__(
            num_train_timesteps=num_train_timesteps, beta_start=beta_start, beta_end=beta_end, beta_schedule=beta_schedule,
            trained_betas=trained_betas, rescale_betas_zero_snr=rescale_betas_zero_snr, prediction_type=prediction_type,
            clip_sample=clip_sample, original_inference_steps=len(student_timesteps),
        )  # fmt: skip

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Any = None, **more: Any
    ) -> None:
        if timesteps is not None:
            return super().set_timesteps(device=device, timesteps=timesteps, **more)
        stored = list(self.config.student_timesteps)
        _check(num_inference_steps, stored, "timesteps")
        self.num_inference_steps, self.custom_timesteps = len(stored), True
        self.timesteps = torch.tensor(stored, dtype=torch.long, device=device)
        self._step_index = self._begin_index = None


class StoredSigmasScheduler(FlowMatchEulerDiscreteScheduler):
    """FlowMatchEulerDiscreteScheduler at fixed noise levels (before its shift), with fresh noise between the calls."""

    @register_to_config
    def __init__(
        self,
        student_sigmas: tuple[float, ...] = (1.0,),
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        stochastic_sampling: bool = True,
    ) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps, shift=shift, stochastic_sampling=stochastic_sampling)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, **more: Any
    ) -> None:
        stored = list(self.config.student_sigmas)
        given = [] if sigmas is None else [float(sigma) for sigma in sigmas]
        # some pipelines always pass 1, 1 - 1/K, ..., which are not the student's times
        if all(abs(sigma - (1 - step / len(given))) < 1e-5 for step, sigma in enumerate(given)):
            _check(len(given) or num_inference_steps, stored, "sigmas")
            sigmas = stored
        super().set_timesteps(device=device, sigmas=[float(sigma) for sigma in sigmas])
