"""A model card (README.md with front matter) that says what a student is, how to sample it, and what was measured."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import yaml

from fewstep.diffusion.noise import Discrete
from fewstep.networks import FAMILIES, FLUX_GUIDANCE
from fewstep.networks.lora import Adapted
from fewstep.students.student import Student
from fewstep.teachers.facts import zero_snr
from fewstep.teachers.pipelines import pipeline_class

__all__ = ["model_card"]


def model_card(student: Student, name: str, formats: Sequence[str], license: str, call: str) -> str:
    """The card as Markdown.

    Args:
        student: whose.
        name: its title.
        formats: what lies beside the card.
        license: for the front matter.
        call: the pipeline's argument that says how many steps, or which.
    """
    assert student.pipeline is not None, "a card of a student without a pipeline"
    provenance, run = student.provenance, student.provenance.get("run") or {}
    lora = student.generator.denoiser.spec if isinstance(student.generator.denoiser, Adapted) else None
    front = {
        "base_model": student.pipeline.path,
        "pipeline_tag": "text-to-image",
        "license": license,
        "library_name": "diffusers",
        "tags": [
            "fewstep",
            "few-step",
            str((run.get("objective") or {}).get("method", "distilled")),
            *(["lora"] if lora else []),
        ],
    }
    steps = student.generator.steps
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"A {steps}-step student of `{student.pipeline.path}`, distilled with [{provenance.get('made_by', 'fewstep')}]"
        "(https://pypi.org/project/fewstep/). Sample it without guidance.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _facts(student, run, lora).items()),
        "",
    ]
    if "diffusers" in formats:
        lines += _code(
            "from diffusers import DiffusionPipeline",
            "",
            'pipeline = DiffusionPipeline.from_pretrained("this folder")  # on a GPU also: torch_dtype=torch.float16',
            f'image = pipeline("a prompt", {call}, {_guidance(student)}{_text(student)}{_size(student)}).images[0]',
        )
    if lora:
        unet = student.net.model == "UNet2DConditionModel"
        others = f"`{name}_lora.safetensors` for ComfyUI (models/loras) and A1111, both" if unet else "and for ComfyUI,"
        lines += [
            f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}. `pytorch_lora_weights.safetensors` is for diffusers, {others} at "
            "strength 1.",
            "",
        ]
    if "comfyui" in formats:
        lines += [f"ComfyUI: sampler `lcm`, scheduler `simple`, {steps} steps, cfg 1.", ""]
    lines += _scores(provenance.get("scores") or {})
    return "\n".join(lines)


def _facts(student: Student, run: dict[str, Any], lora: Any) -> dict[str, Any]:
    provenance, objective, schedule = (
        student.provenance,
        run.get("objective") or {},
        student.generator.denoiser.schedule,
    )
    table = isinstance(schedule, Discrete)
    times: list[Any] = [f"{time:.4g}" for time in student.generator.times]
    if isinstance(schedule, Discrete):
        times = [round(time * (len(schedule.alphas_cumprod) - 1)) for time in student.generator.times]
    facts = {
        "network calls an image": student.generator.steps,
        "timesteps" if table else "times before the shift": ", ".join(map(str, times)),
        "size of a picture": "{2} x {1} pixels, width x height".format(*student.codec.shape) if student.codec else None,
        "guidance when sampling": f"an input of the network ({_guidance(student)})"
        if _guidance(student) != "guidance_scale=0"
        else "none (guidance_scale 0, cfg 1)",
        "noise table": "zero terminal SNR" if zero_snr(schedule) else None,
        "guidance learnt": objective.get("guidance"),
        "negative prompt learnt": student.settings.negative_prompt,
        "method": objective.get("method"),
        "LoRA": f"rank {lora.rank}, alpha {lora.alpha:g}" if lora else None,
        "images seen in training": f"{provenance['images']:,}" if "images" in provenance else None,
        "trained on": provenance.get("hardware"),
        "date": provenance.get("date"),
    }
    return {key: value for key, value in facts.items() if value is not None}


def _guidance(student: Student) -> str:
    """The pipeline's argument: networks that are told their guidance as an input need what they were trained with."""
    config = student.net.config
    if not FAMILIES[student.net.model].guided_inside(config):
        return "guidance_scale=0"
    told = student.settings.guidance_input
    return f"guidance_scale={FLUX_GUIDANCE if told is None else told:g}"


def _text(student: Student) -> str:
    """Further arguments, where prompts were not encoded as the pipeline's call does by itself."""
    given = student.settings.text.model_dump(exclude_none=True)
    return "".join(f", {name}={list(value) if isinstance(value, tuple) else value!r}" for name, value in given.items())


def _size(student: Student) -> str:
    """Further arguments, where the pictures are not of the size that the pipeline draws by itself."""
    if student.settings.resolution is None or student.codec is None:
        return ""
    _, height, width = student.codec.shape
    kind = pipeline_class(student.settings.path, student.settings.config)
    bins = "use_resolution_binning" in inspect.signature(kind.__call__).parameters  # SANA and PixArt draw another size
    return f", height={height}, width={width}" + (", use_resolution_binning=False" if bins else "")


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


def _code(*lines: str) -> list[str]:
    return ["```python", *lines, "```", ""]
