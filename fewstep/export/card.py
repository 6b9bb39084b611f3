"""A model card (README.md with front matter) that says what a student is, how to sample it, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from fewstep.lora import Adapted
from fewstep.student import Student

__all__ = ["model_card"]


def model_card(
    student: Student, name: str, timesteps: Sequence[int], formats: Sequence[str], license: str, unusual: bool = False
) -> str:
    """The card as Markdown.

    Args:
        student: whose.
        name: its title.
        timesteps: where it is called.
        formats: what lies beside the card.
        license: for the front matter.
        unusual: the timesteps are not those that the stored scheduler visits by itself.
    """
    assert student.pipeline is not None, "a card of a student without a pipeline"
    card, run = student.card, student.card.get("run") or {}
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
    steps = len(timesteps)
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"A {steps}-step student of `{student.pipeline.path}`, distilled with [{card.get('made_by', 'fewstep')}]"
        "(https://pypi.org/project/fewstep/). Sample it without guidance.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _facts(card, run, timesteps, lora).items()),
        "",
    ]
    if "diffusers" in formats:
        how = f"timesteps={list(timesteps)}" if unusual else f"num_inference_steps={steps}"
        lines += _code(
            "from diffusers import DiffusionPipeline",
            "",
            'pipeline = DiffusionPipeline.from_pretrained("this folder")',
            f'image = pipeline("a prompt", {how}, guidance_scale=0).images[0]',
        )
    if lora:
        lines += [
            f"LoRA: rank {lora.rank}, alpha {lora.alpha:g}. `pytorch_lora_weights.safetensors` is for diffusers, "
            f"`{name}_lora.safetensors` for ComfyUI (models/loras) and A1111, both at strength 1.",
            "",
        ]
    lines += [
        f"ComfyUI: sampler `lcm`, scheduler `simple`, {steps} steps, cfg 1.",
        "",
        *_scores(card.get("scores") or {}),
    ]
    return "\n".join(lines)


def _facts(card: dict[str, Any], run: dict[str, Any], timesteps: Sequence[int], lora: Any) -> dict[str, Any]:
    objective = run.get("objective") or {}
    facts = {
        "network calls an image": len(timesteps),
        "timesteps": ", ".join(map(str, timesteps)),
        "guidance when sampling": "none (guidance_scale 0, cfg 1)",
        "guidance learnt": objective.get("guidance"),
        "method": objective.get("method"),
        "LoRA": f"rank {lora.rank}, alpha {lora.alpha:g}" if lora else None,
        "images seen in training": f"{card['images']:,}" if "images" in card else None,
        "trained on": card.get("hardware"),
        "date": card.get("date"),
    }
    return {key: value for key, value in facts.items() if value is not None}


def _scores(scores: dict[str, Any]) -> list[str]:
    if not any(key in scores for key in ("fid", "kid", "precision", "recall")):
        return ["No metric was measured.", ""]
    numbers = [
        f"{key} {scores[key]:.4g}" for key in ("fid", "kid", "precision", "recall") if scores.get(key) is not None
    ]
    return [
        f"Measured: {', '.join(numbers)} ({scores.get('n', '?')} samples, protocol `{scores.get('protocol')}`).",
        "",
    ]


def _code(*lines: str) -> list[str]:
    return ["```python", *lines, "```", ""]
