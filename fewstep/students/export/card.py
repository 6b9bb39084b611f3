"""A model card (README.md with front matter) that says what a student is, how to sample it, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from fewstep.diffusion.noise import Discrete
from fewstep.students.export.calls import LORA, BaseModel, base_code, folder_code, guidance, lora_loader
from fewstep.students.export.comfyui import NO_CLASS, OTHER_NAMES, obstacle
from fewstep.students.export.facts import Facts
from fewstep.students.export.lowbit import Rounded
from fewstep.teachers.facts import zero_snr

__all__ = ["model_card"]


def model_card(
    facts: Facts,
    name: str,
    formats: Sequence[str],
    license: str,
    custom: bool,
    base: BaseModel,
    rounded: Rounded | None = None,
) -> str:
    """The card as Markdown.

    Args:
        facts: of the student.
        name: its title.
        formats: exported formats.
        license: for the front matter.
        custom: whether the scheduler is of a class of our own.
        base: the base model.
        rounded: error with 8-bit weights; None: not measured.
    """
    provenance, run = facts.provenance, facts.provenance.get("run") or {}
    front = {
        **({"base_model": base.name} if base.name else {}),
        "pipeline_tag": "text-to-image",
        "license": license,
        "library_name": "diffusers",
        "tags": [
            "fewstep",
            "few-step",
            str((run.get("objective") or {}).get("method", "distilled")),
            *(["lora"] if facts.lora else []),
        ],
    }
    teacher = f"`{base.name or facts.base_name}`"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"A {facts.steps}-step student of {teacher}, distilled with {provenance.get('made_by', 'fewstep')}. Sample it without "
        "guidance.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _facts(facts, run).items()),
        f"| error with 8-bit weights | {rounded or 'not measured (`fewstep export --probes 2` does)'} |",
        "",
    ]
    if "diffusers" in formats:
        lines += [*folder_code(facts, base.absent, custom), _steps(facts, custom), ""]
    if "lora" in formats:
        lines += _lora(facts, formats, base, custom)
    lines += _files(facts, name, formats)
    lines += _scores(provenance.get("scores") or {})
    return "\n".join(lines)


def _steps(facts: Facts, custom: bool) -> str:
    """Say what another number of steps does."""
    if custom:
        return (
            f"No scheduler of diffusers visits {facts.times_argument} by itself: `scheduler/stored_scheduler.py` is one that does. "
            "Any other number of steps is an error."
        )
    return (
        f"Always give `num_inference_steps={facts.steps}`: with another number, or none, diffusers stops with an error or calls "
        "the student at times that it was not trained at, and says nothing."
    )


def _lora(facts: Facts, formats: Sequence[str], base: BaseModel, custom: bool) -> list[str]:
    peft = f"`{LORA}/pytorch_lora_weights.safetensors`"
    spec = facts.lora
    lines = [
        f"LoRA: rank {spec.rank}, alpha {spec.alpha:g}, for the base model"
        + (" (the pipeline of this folder contains it already)." if "diffusers" in formats else "."),
        "",
        "Beside another LoRA the two changes of the weights add, each times its strength. How pictures follow the other one is known "
        "only if a table below says so.",
        "",
    ]
    changed = facts.settings.latents.config()
    tuned = f" The VAE's configuration of the base model must have {changed}." if changed else ""
    if facts.settings.lora is not None:
        named = f"`{facts.settings.lora.name}`"
        tuned += f" The base model is with the LoRA {named} merged at strength {facts.settings.lora_scale:g}."
    if (loader := lora_loader(facts)) != "load_lora_weights":
        cannot = f"{facts.pipeline.__name__} of diffusers cannot load a LoRA"
        if loader is None:
            return [*lines, f"{peft} is for ComfyUI: {cannot}.{tuned}", ""]
        tuned = f"{cannot}, its network can.{tuned}"
    return lines + ([tuned.strip(), ""] if tuned else []) + base_code(facts, base, custom)


def _files(facts: Facts, name: str, formats: Sequence[str]) -> list[str]:
    """Return the folders of other programs in which the files belong."""
    lines, why = [], obstacle(facts)
    if "lora" in formats and facts.unet:
        lines.append(f"`{LORA}/{name}_lora.safetensors`: for ComfyUI (models/loras), A1111 and Forge, at strength 1.")
    elif "lora" in formats and facts.net.model in NO_CLASS:
        lines.append("ComfyUI has no class for this network: the LoRA is for diffusers alone.")
    elif "lora" in formats and facts.net.model in OTHER_NAMES:
        lines.append("ComfyUI does not know this network's layers by these names: the LoRA is for diffusers alone.")
    elif "lora" in formats:
        lines.append(f"`{LORA}/pytorch_lora_weights.safetensors`: for ComfyUI too (models/loras), at strength 1.")
    if "unet" in formats:
        lines.append(f"`{name}_{facts.family.component}.safetensors`: for ComfyUI (models/diffusion_models).")
    if "fp8" in formats:
        lines.append(
            f"`{name}_{facts.family.component}_fp8.safetensors`: the same with float8 weights (e4m3fn, cast without scales) in its "
            "blocks."
        )
    if "checkpoint" in formats:
        lines.append(f"`{name}.safetensors`: for ComfyUI (models/checkpoints), A1111 and Forge.")
    if "comfyui" in formats:
        lines.append(
            f"`{name}_comfyui.json`: a ComfyUI workflow: sampler `lcm`, scheduler `simple`, {facts.steps} steps, cfg 1."
        )
    elif lines and why:
        lines.append(f"No ComfyUI workflow: {why}.")
    return [line for text in lines for line in (text, "")]


def _sizes(facts: Facts) -> str | None:
    """Buckets that the student was trained at."""
    buckets = facts.settings.buckets
    if buckets == "auto":
        return "shapes from 1:2 to 2:1 with about as many pixels"
    return ", ".join(f"{width} x {height}" for width, height in buckets) or None


def _facts(facts: Facts, run: dict[str, Any]) -> dict[str, Any]:
    provenance, objective = facts.provenance, run.get("objective") or {}
    table = isinstance(facts.schedule, Discrete)
    times: list[Any] = facts.timesteps if table else [f"{time:.4g}" for time in facts.times]
    height, width = facts.picture
    found = {
        "network calls per image": facts.steps,
        "timesteps" if table else "times before the shift": ", ".join(map(str, times)),
        "sigmas" + (", noise over signal" if table else ", after the shift"): ", ".join(
            f"{sigma:.4g}" for sigma in facts.sigmas
        ),
        "base network in training": facts.settings.quantize,
        "size of a picture": f"{width} x {height} pixels, width x height",
        "sizes of training": _sizes(facts),
        "guidance when sampling": f"an input of the network ({guidance(facts)})"
        if facts.family.guided_inside(facts.net.config)
        else "none (guidance_scale 0, cfg 1)",
        "noise table": "zero terminal SNR" if zero_snr(facts.schedule) else None,
        "guidance learnt": objective.get("guidance"),
        "negative prompt learnt": facts.settings.negative_prompt,
        "method": objective.get("method"),
        "LoRA": f"rank {facts.lora.rank}, alpha {facts.lora.alpha:g}" if facts.lora else None,
        "images seen in training": f"{provenance['images']:,}" if "images" in provenance else None,
        "trained on": provenance.get("hardware"),
        "date": provenance.get("date"),
    }
    return {key: value for key, value in found.items() if value is not None}


def _scores(scores: dict[str, Any]) -> list[str]:
    numbers = [
        f"{key} {value:.4g}" for key, value in scores.items() if isinstance(value, float) and not key.endswith("_std")
    ]
    if not numbers:
        return ["No metric was measured.", ""]
    return [
        f"Measured: {', '.join(numbers)} ({scores.get('n', '?')} samples, protocol `{scores.get('protocol')}`).",
        "",
    ]
