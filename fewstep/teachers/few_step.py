"""Recognise few-step or guidance-distilled teachers from their configurations and names.

A few-step model is valid only at a few noise levels and its score is not that of its data, so distilling it would fail
silently. `RULES` is the only table. Reads no weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from fewstep.system.console import note
from fewstep.system.errors import TeacherError

__all__ = ["RULES", "About", "Rule", "check_few_step"]

_NAMED = re.compile(
    r"(?<![a-z])(turbo|lightning|lcm|tcd|pcm|dmd2?|schnell|sprint|hyper-?(?:sd|sdxl|flux)|\d{1,2}-?steps?)(?![a-z])"
)


_FLUX = ("FluxTransformer2DModel", "Flux2Transformer2DModel")


@dataclass(frozen=True)
class About:
    """Configurations of a pipeline.

    Attributes:
        path: its folder, hub name or file.
        lora: name of the LoRA that is merged into it; None without one.
        index: model_index.json; empty for a single file.
        scheduler: the scheduler's configuration, with `_class_name`.
        model: class of the network.
        network: its configuration.
    """

    path: str
    lora: str | None = None
    index: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    network: Mapping[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> str | None:
        """Part of the LoRA's or model's name that is typical of few-step models."""
        names = [PurePath(name).name.removesuffix(".safetensors") for name in (self.lora, self.path) if name]
        found = (_NAMED.search(name.lower().replace("_", "-")) for name in names)
        return next((match[0] for match in found if match), None)


@dataclass(frozen=True)
class Rule:
    """A line of the table.

    Attributes:
        example: a published model that it recognises.
        fits: whether a teacher matches the rule.
        fact: description of the match, for the message.
        refused: whether to refuse the teacher; else it is reported.
    """

    example: str
    fits: Callable[[About], bool]
    fact: Callable[[About], str]
    refused: bool = True


def _scheduler(about: About) -> str:
    return str(about.scheduler.get("_class_name"))


def _is_schnell(about: About) -> bool:
    flux = about.model == "FluxTransformer2DModel" and not about.network.get("guidance_embeds")
    return flux and bool(about.scheduler) and not about.scheduler.get("use_dynamic_shifting")


def _is_trailing_eps(about: About) -> bool:
    config = about.scheduler
    usual = config.get("prediction_type", "epsilon") == "epsilon" and not config.get("rescale_betas_zero_snr")
    return about.model.startswith("UNet2D") and config.get("timestep_spacing") == "trailing" and usual


RULES = (
    Rule(
        "LCM_Dreamshaper_v7, TCD-SDXL",
        lambda about: _scheduler(about) in ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"),
        lambda about: f"the scheduler {_scheduler(about)}, which samples consistency models in few steps",
    ),
    Rule(
        "LCM_Dreamshaper_v7",
        lambda about: bool(about.network.get("time_cond_proj_dim")),
        lambda about: (
            "a UNet that takes its guidance as an input (time_cond_proj_dim), as latent consistency models do"
        ),
    ),
    Rule(
        "SANA-Sprint",
        lambda about: (
            about.index.get("_class_name") == "SanaSprintPipeline"
            or _scheduler(about) == "SCMScheduler"
            or (about.model == "SanaTransformer2DModel" and bool(about.network.get("guidance_embeds")))
        ),
        lambda about: "SANA-Sprint, which samples in one to four steps",
    ),
    Rule(
        "FLUX.2-klein-4B",
        lambda about: bool(about.index.get("is_distilled")),
        lambda about: "a model_index.json that says is_distilled",
    ),
    Rule(
        "FLUX.1-schnell",
        _is_schnell,
        lambda about: "a FLUX.1 without guidance_embeds and dynamic shifting, which FLUX.1-schnell is",
    ),
    Rule(
        "SDXL-Turbo, SDXL-Lightning, Z-Image-Turbo, Qwen-Image-Lightning",
        lambda about: about.named is not None,
        lambda about: f"{about.named!r} in the name of its {'LoRA' if _of_the_lora(about) else 'model'}",
    ),
    Rule(
        "SD-Turbo",
        _is_trailing_eps,
        lambda about: (
            "a scheduler with trailing timesteps for eps-prediction, which few-step models such as SD-Turbo have: "
            "if it is one, distil its base model instead"
        ),
        refused=False,
    ),
    Rule(
        "FLUX.1-dev, FLUX.2-dev",
        lambda about: about.model in _FLUX and bool(about.network.get("guidance_embeds")),
        lambda about: (
            "guidance distilled into it: the student learns it at the input guidance "
            "(teacher.guidance_input), and cannot be guided more by objective.guidance"
        ),
        refused=False,
    ),
)


def _of_the_lora(about: About) -> bool:
    return about.lora is not None and About(about.lora).named is not None


def check_few_step(about: About, allowed: bool) -> None:
    """Refuse or report a distilled teacher.

    Args:
        about: the teacher.
        allowed: report instead of refusing.

    Raises:
        TeacherError: it is a few-step model.
    """
    for rule in RULES:
        if not rule.fits(about):
            continue
        if rule.refused and not allowed:
            raise TeacherError(
                f"teacher.path must be a model that needs many steps, got {about.path}, which has {rule.fact(about)}: the scores of a "
                "few-step model are not those of its data. Try: the model that it was distilled from, or "
                "teacher.allow_few_step true"
            )
        note(f"{about.path} has {rule.fact(about)}")
        if rule.refused:
            return
