"""Properties of a pretrained pipeline that the distillation depends on, and settings that override them.

The prediction type, noise table or flow shift, and scaling of the VAE's latents are read from the pipeline's configurations
and from marker keys of single files. A setting is written into the pipeline's own configuration, so that samples and exported
folders keep it. Every contradiction is printed. Knows no weights and no text.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, ValidationError
from torch import Tensor

from fewstep.diffusion.noise import Discrete, RectifiedFlow, Schedule
from fewstep.diffusion.preconditioned import Prediction
from fewstep.system.console import note
from fewstep.system.errors import TeacherError
from fewstep.system.record import Record
from fewstep.teachers.refusals import another_task, is_flow, refuse_other_noise

__all__ = [
    "Betas",
    "LatentScaling",
    "Latents",
    "change_scheduler",
    "file_marks",
    "prediction_of",
    "schedule_of",
    "zero_snr",
]

PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}
NO_SIGNAL = 1e-6  # a table that ends below this has zero terminal SNR: diffusers' Euler scheduler stores 2**-24
_EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")  # marks that ComfyUI reads


class Betas(Record):
    """A noise table: beta at both ends and the curve between them; null leaves the scheduler's value."""

    start: float | None = Field(None, gt=0, lt=1)
    """beta of the first step; Stable Diffusion's is 0.00085."""
    end: float | None = Field(None, gt=0, lt=1)
    """beta of the last step; Stable Diffusion's is 0.012."""
    curve: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None
    """Curve of beta; Stable Diffusion's is scaled_linear: the square root of beta is linear."""

    def config(self) -> dict[str, Any]:
        """The settings under the names of the scheduler's configuration."""
        names = {"start": "beta_start", "end": "beta_end", "curve": "beta_schedule"}
        return {names[name]: value for name, value in self.model_dump(exclude_none=True).items()}


class Latents(Record):
    """Scaling of the VAE's latents; null leaves the configuration's value."""

    scale: float | None = Field(None, gt=0)
    """scaling_factor."""
    shift: float | None = None
    """shift_factor (SD3, FLUX)."""
    mean: tuple[float, ...] | None = None
    """latents_mean, a number a channel (SDXL pipelines)."""
    std: tuple[PositiveFloat, ...] | None = None
    """latents_std."""

    def config(self) -> dict[str, Any]:
        """The settings under the names of the VAE's configuration."""
        names = {"scale": "scaling_factor", "shift": "shift_factor", "mean": "latents_mean", "std": "latents_std"}
        found = self.model_dump(exclude_none=True)
        return {names[name]: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


# -- single files --------------------------------------------------------------------------------------------------------


def file_marks(path: Path) -> dict[str, tuple[Any, str]]:
    """Read a single file's scheduler settings: names of diffusers' configuration -> (value, the marker that states it).

    Fine-tunes mark v-prediction and zero terminal SNR by the empty tensors `v_pred` and `ztsnr`, which ComfyUI and Forge
    read, or in their header by `modelspec.prediction_type` (Stability AI's ModelSpec 1.0).

    Raises:
        TeacherError: the file marks an unsupported noise law, or is a model of another task.
        OSError, SafetensorError: it cannot be read.
    """
    from safetensors import safe_open

    marks: dict[str, tuple[Any, str]] = {}
    with safe_open(path, "pt") as file:
        names, header = set(file.keys()), file.metadata() or {}
        first = next((name for name in names if name.endswith("input_blocks.0.0.weight")), None)
        channels = file.get_slice(first).get_shape()[1] if first else 4
    if edm := sorted(names & set(_EDM)):
        raise TeacherError(
            f"{path} must predict eps or v of a DDPM table, got the key {edm[0]}, which marks EDM's noise law. Try: a model "
            "without it"
        )
    if channels != 4:
        raise TeacherError(another_task(str(path), channels, 4))
    kind = header.get("modelspec.prediction_type")
    if kind in ("v", "epsilon"):
        value = {"v": "v_prediction", "epsilon": "epsilon"}[kind]
        marks["prediction_type"] = value, f"its header (modelspec.prediction_type {kind})"
    if "v_pred" in names:
        marks["prediction_type"] = "v_prediction", "the file's key v_pred"
    if "ztsnr" in names:
        marks["rescale_betas_zero_snr"] = True, "the file's key ztsnr"
    return marks


# -- the scheduler -------------------------------------------------------------------------------------------------------


def change_scheduler(
    pipeline: Any, whose: str, marks: Mapping[str, tuple[Any, str]], settings: Mapping[str, Any], shift: float | None
) -> None:
    """Replace a pipeline's scheduler according to its file's markers and the user's settings; print contradictions.

    Args:
        pipeline: pipeline of diffusers.
        whose: its name, for messages.
        marks: markers from `file_marks`, which override the configuration.
        settings: names of diffusers' configuration -> values, which override both.
        shift: shift of a flow; None leaves the configuration's.

    Raises:
        TeacherError: a shift for a model with a noise table, or settings of a table for a flow.
    """
    scheduler, config = pipeline.scheduler, dict(pipeline.scheduler.config)
    flow = is_flow(scheduler)
    changes: dict[str, Any] = {}
    for name, (value, source) in marks.items():
        if _differs(config, name, value):
            note(
                f"{whose}: the scheduler's configuration has {name} {config.get(name)}, {source} says {value}, which is used"
            )
            changes[name] = value
    for name, value in settings.items():
        if flow:
            raise TeacherError(
                f"teacher.{_SETTINGS[name]} must be left out for a flow, got {value}: the scheduler of {whose} is "
                f"{type(scheduler).__name__}, which has no noise table"
            )
        there, source = changes.get(name, config.get(name)), "the file" if name in changes else "the configuration"
        if _differs({name: there}, name, value):
            note(f"{whose}: {source} has {name} {there}, teacher.{_SETTINGS[name]} says {value}, which is used")
        changes[name] = value
    if shift is not None:
        if not flow:
            raise TeacherError(
                f"teacher.shift must be left out, got {shift}: {whose} has a noise table and is not a flow model"
            )
        name = "flow_shift" if config.get("use_flow_sigmas") else "shift"
        if config.get("use_dynamic_shifting") or config.get(name, 1.0) != shift:
            before = "by resolution" if config.get("use_dynamic_shifting") else config.get(name, 1.0)
            note(f"{whose}: the scheduler shifts {before}, teacher.shift says {shift}, which is used")
        changes |= {name: shift, "use_dynamic_shifting": False}
    if not changes:
        return
    kind = type(scheduler)
    if any(name.startswith("beta_") for name in changes):
        changes["trained_betas"] = None
    taken = inspect.signature(kind.__init__).parameters
    if "rescale_betas_zero_snr" in changes and "rescale_betas_zero_snr" not in taken:
        import diffusers

        kind = diffusers.EulerDiscreteScheduler  # PNDM, Heun and others cannot rescale their table
    pipeline.register_modules(scheduler=kind.from_config(config, **changes))


_SETTINGS = {
    "prediction_type": "prediction", "rescale_betas_zero_snr": "zero_snr", "beta_start": "betas.start",
    "beta_end": "betas.end", "beta_schedule": "betas.curve",
}  # fmt: skip
_DEFAULTS = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}


def _differs(config: Mapping[str, Any], name: str, value: Any) -> bool:
    there = config.get(name)
    return (_DEFAULTS.get(name) if there is None else there) != value


def schedule_of(
    scheduler: Any, whose: str, size: tuple[int, int], rule: Callable[[tuple[int, int]], float] | None = None
) -> Discrete | RectifiedFlow:
    """Read the noise schedule of a scheduler: a table, or a flow with its shift.

    Args:
        scheduler: scheduler of diffusers.
        whose: its pipeline's name, for messages.
        size: height and width of a sample, for shifts that grow with the number of tokens.
        rule: of the family, where the scheduler leaves the shift to the pipeline's call; None: its configuration's.

    Raises:
        TeacherError: an unsupported noise law.
    """
    config = scheduler.config
    if is_flow(scheduler):
        if (steps := config.get("num_train_timesteps", 1000)) != 1000:
            raise TeacherError(
                f"the scheduler of {whose} must have 1000 training timesteps, got {steps}: not known here"
            )
        if not config.get("use_dynamic_shifting"):
            return RectifiedFlow(shift=config.get("flow_shift" if config.get("use_flow_sigmas") else "shift", 1.0))
        if rule is not None:
            return RectifiedFlow(shift=rule(size))
        # the shift, or its logarithm, grows linearly with the number of tokens, 2 x 2 latents each (FLUX, SD3)
        tokens, low, high = (
            (size[0] // 2) * (size[1] // 2),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
        )
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = base + (most - base) / (high - low) * (tokens - low)
        return RectifiedFlow(shift=mu if config.get("time_shift_type") == "linear" else math.exp(mu))
    refuse_other_noise(scheduler, whose)
    table = scheduler.alphas_cumprod.double().tolist()
    if config.get("rescale_betas_zero_snr"):
        table[-1] = 0.0  # Euler's scheduler stores 2**-24 for its sigmas; other schedulers, as students get, store 0
    try:
        return Discrete(alphas_cumprod=tuple(table))
    except ValidationError as error:
        raise TeacherError(
            f"the noise table of {whose} must lose signal at every step: {error.errors()[0]['msg']}"
        ) from None


def prediction_of(scheduler: Any, schedule: Discrete | RectifiedFlow, whose: str) -> Prediction:
    """Read the network's prediction type.

    Raises:
        TeacherError: an unsupported type, or eps with a table that ends without signal.
    """
    if isinstance(schedule, RectifiedFlow):
        return "flow"
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS or kind == "flow_prediction":
        raise TeacherError(
            f"{whose} must predict one of {', '.join(PREDICTIONS)}, got {kind!r} of its scheduler. Try: teacher.prediction"
        )
    if PREDICTIONS[kind] == "eps" and zero_snr(schedule):
        raise TeacherError(
            f"{whose} must predict v or x0 with zero terminal SNR, got eps, which does not determine the picture at the "
            "last step. Try: teacher.prediction v, or teacher.zero_snr false"
        )
    return PREDICTIONS[kind]


def zero_snr(schedule: Schedule) -> bool:
    """Return whether a noise table ends without signal, as `rescale_betas_zero_snr` makes it (Lin et al. 2024, arXiv 2305.08891)."""
    return isinstance(schedule, Discrete) and schedule.alphas_cumprod[-1] < NO_SIGNAL


# -- the VAE -------------------------------------------------------------------------------------------------------------

_APPLIED: dict[str, tuple[str, ...]] = (
    {  # beginnings of pipelines' names -> what their call applies of the configuration
        "StableDiffusionXL": ("scaling_factor", "latents_mean", "latents_std"),
        "Flux2": (),  # statistics of folded latents, which are weights of its VAE
        "QwenImage": ("latents_mean", "latents_std"),
        "Krea2": ("latents_mean", "latents_std"),
    }
    | dict.fromkeys(
        ("StableDiffusion3", "Flux", "ZImage", "Lumina", "Chroma", "LongCat"), ("scaling_factor", "shift_factor")
    )
)


@dataclass(frozen=True)
class LatentScaling:
    """The affine map between a VAE's latents and what the network works on: raw = z std / scale + mean + shift.

    Attributes:
        scale: scaling_factor.
        shift: shift_factor.
        mean, std: a number a channel; None where the pipeline has none.
    """

    scale: float
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, pipeline: Any, whose: str, settings: Latents) -> LatentScaling:
        """Read the scaling that the pipeline's own call applies. A value that it does not apply is reported, or refused where a setting asks for it.

        Args:
            pipeline: of diffusers; settings are written into its VAE's configuration.
            whose: its name, for messages.
            settings: of the user.

        Raises:
            TeacherError: a setting that the pipeline does not apply, or with another number of channels.
        """
        kind, vae = type(pipeline).__name__, pipeline.vae
        applied = next((names for start, names in _APPLIED.items() if kind.startswith(start)), ("scaling_factor",))
        changes = settings.config()
        for name, value in changes.items():
            if name not in applied:
                raise TeacherError(
                    f"teacher.latents must hold what the pipeline applies, got {name}: {kind} does not apply it, so that "
                    "neither would what is exported. Try: leave it out"
                )
            if vae.config.get(name) not in (None, value):
                note(
                    f"{whose}: the VAE's configuration has {name} {vae.config[name]}, teacher.latents says {value}, which is used"
                )
        vae.register_to_config(**changes)
        config = vae.config
        if (statistics := getattr(vae, "bn", None)) is not None:
            std = (statistics.running_var + config.batch_norm_eps).sqrt()
            return cls(1.0, 0.0, tuple(statistics.running_mean.tolist()), tuple(std.tolist()))
        found = {name: config.get(name) for name in ("shift_factor", "latents_mean", "latents_std")}
        if ignored := [name for name, value in found.items() if value and name not in applied]:
            note(f"{whose}: {kind} does not apply its VAE's {' and '.join(ignored)}, and neither does fewstep")
        mean, std = (found[name] if name in applied else None for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:  # as the pipeline: both or neither
            mean = std = None
        for name, value in (("mean", mean), ("std", std)):
            channels = config.get("latent_channels") or config["z_dim"]
            if value is not None and len(value) != channels:
                raise TeacherError(
                    f"latents_{name} of {whose} must have {channels} numbers, got {len(value)}. Try: "
                    f"teacher.latents.{name}"
                )
        shift = (found["shift_factor"] or 0.0) if "shift_factor" in applied else 0.0
        return cls(
            config["scaling_factor"] if "scaling_factor" in applied else 1.0,
            shift,
            tuple(mean) if mean else None,
            tuple(std) if std else None,
        )

    def raw(self, samples: Tensor) -> Tensor:
        """Convert the network's samples [B, C, H, W] to the VAE's latents."""
        if self.mean is None or self.std is None:
            return samples / self.scale + self.shift
        return samples * self._column(self.std, samples) / self.scale + self._column(self.mean, samples) + self.shift

    def scaled(self, raw: Tensor) -> Tensor:
        """The inverse of `raw`."""
        if self.mean is None or self.std is None:
            return (raw - self.shift) * self.scale
        return (raw - self.shift - self._column(self.mean, raw)) * self.scale / self._column(self.std, raw)

    def __str__(self) -> str:
        """Text for hashes; without mean and std it equals that of earlier versions."""
        statistics = "" if self.mean is None else f" {list(self.mean)} {list(self.std or ())}"
        return f"{self.scale} {self.shift}{statistics}"

    @staticmethod
    def _column(numbers: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
