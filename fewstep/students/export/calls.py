"""Python code of a model card: how diffusers loads and calls a student, and the base model as it was in training.

It runs as it stands, once the names in capitals are replaced; a test runs it for every family.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass

from fewstep.diffusion.noise import RectifiedFlow
from fewstep.students.export.facts import Facts, is_hub_name
from fewstep.teachers.pipelines import is_single_file, library

__all__ = [
    "BASE",
    "CONFIG",
    "FOLDER",
    "LORA",
    "TUNING",
    "BaseModel",
    "base_code",
    "folder_code",
    "guidance",
    "lora_loader",
]

# what the reader of a card's code replaces
FOLDER, BASE, CONFIG, TUNING = "THIS_FOLDER", "BASE_MODEL", "BASE_CONFIG", "BASE_LORA"
LORA = "lora"  # folder of the LoRA files, apart from the pipeline that has them merged already


@dataclass(frozen=True)
class BaseModel:
    """How diffusers loads the base model with the components and files of the training.

    Attributes:
        name: its name on the hub; empty: the reader's own copy.
        absent: components that were not there.
        variant: of its files, such as fp16.
    """

    name: str = ""
    absent: Collection[str] = ()
    variant: str | None = None


def folder_code(facts: Facts, absent: Collection[str], custom: bool) -> list[str]:
    """Code for the exported folder.

    Args:
        facts: of the student.
        absent: components that the folder lacks.
        custom: whether its scheduler is of a class of our own.
    """
    arguments = [f'"{FOLDER}"', *_none(facts, absent), *(["trust_remote_code=True"] if custom else [])]
    return _code(
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({', '.join(arguments)})  # on a GPU also: dtype=torch.float16",
        *_mended(facts),
        _call(facts, f"num_inference_steps={facts.steps}"),
    )


def base_code(facts: Facts, base: BaseModel, custom: bool) -> list[str]:
    """Code for the LoRA on the base model.

    Args:
        facts: of the student.
        base: the model.
        custom: whether the folder's scheduler is of a class of our own: then the call names the times.
    """
    settings, optional = facts.settings, _none(facts, base.absent)
    scheduler = "FlowMatchEulerDiscreteScheduler" if isinstance(facts.schedule, RectifiedFlow) else "LCMScheduler"
    kind, loads, arguments = "DiffusionPipeline", "from_pretrained", [f'"{base.name or BASE}"', *optional]
    if is_single_file(settings.path) and not base.name:
        kind, loads = facts.pipeline.__name__, "from_single_file"
        if settings.config is not None:
            arguments.append(f'config="{settings.config if is_hub_name(settings.config) else CONFIG}"')
    if base.variant is not None:
        arguments.append(f'variant="{base.variant}"')
    # text encoders else have the dtype of their configuration, often float16, and the network float32
    arguments.append("dtype=torch.float32")
    lines = [f"pipeline = {kind}.{loads}({', '.join(arguments)})  # on a GPU: dtype=torch.float16"]
    if changed := settings.latents.config():
        values = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        lines.append(f"pipeline.vae.register_to_config({values})")
    loader = lora_loader(facts)
    if settings.lora is not None and loader == "load_lora_weights":
        lines += [
            f'pipeline.load_lora_weights("{TUNING}")  # {settings.lora.name}',
            f"pipeline.fuse_lora(lora_scale={settings.lora_scale:g})",
            "pipeline.unload_lora_weights()",
        ]
    return _code(
        "import torch",
        f"from diffusers import {', '.join(sorted((kind, scheduler)))}",
        "",
        *lines,
        f'pipeline.{loader}("{FOLDER}", subfolder="{LORA}", weight_name="pytorch_lora_weights.safetensors")',
        f'pipeline.scheduler = {scheduler}.from_pretrained("{FOLDER}", subfolder="scheduler")',
        *_mended(facts),
        _call(facts, facts.times_argument if custom else f"num_inference_steps={facts.steps}"),
    )


def _call(facts: Facts, steps: str) -> str:
    arguments = ", ".join([guidance(facts), *_text(facts), *_size(facts)])
    return f'image = pipeline(prompt="a prompt", {steps}, {arguments}).images[0]'


def _none(facts: Facts, absent: Collection[str]) -> list[str]:
    """Arguments for components that diffusers demands, null in model_index.json or not (SD3's T5)."""
    optional = set(facts.pipeline._optional_components) - set(facts.settings.without)
    return [f"{name}=None" for name in sorted(absent) if name not in optional]


def _mended(facts: Facts) -> list[str]:
    """Lines for what diffusers looks for in vain."""
    if not facts.unet or facts.sdxl or facts.settings.text.clip_skip is None:
        return []
    return [
        'if not hasattr(pipeline.text_encoder, "text_model"):  # transformers 5: diffusers\' clip_skip looks for it',
        '    pipeline.text_encoder.__dict__["text_model"] = pipeline.text_encoder',
    ]


def lora_loader(facts: Facts) -> str | None:
    """Return the method of the base model's pipeline, or of its network, that loads a LoRA; None if diffusers has neither."""
    if hasattr(facts.pipeline, "load_lora_weights"):
        return "load_lora_weights"
    network = getattr(library(), facts.net.model)
    return f"{facts.family.component}.load_lora_adapter" if hasattr(network, "load_lora_adapter") else None


def guidance(facts: Facts) -> str:
    """Guidance argument of the pipeline: networks with guidance as an input need that of their training."""
    if not facts.family.guided_inside(facts.net.config):
        return facts.family.unguided
    given = facts.settings.guidance_input
    return f"guidance_scale={facts.family.guidance if given is None else given:g}"


def _text(facts: Facts) -> list[str]:
    """Further arguments, if prompts were not encoded with the defaults of the pipeline's call."""
    given = facts.settings.text.model_dump(exclude_none=True)
    return [f"{name}={list(value) if isinstance(value, tuple) else value!r}" for name, value in given.items()]


def _size(facts: Facts) -> list[str]:
    """Further arguments, if the pictures do not have the pipeline's default size."""
    height, width = facts.picture
    known = inspect.signature(facts.pipeline.__call__).parameters
    # SANA and PixArt draw the nearest of a list of sizes
    bins = ["use_resolution_binning=False"] if "use_resolution_binning" in known else []
    return ([] if facts.usual_size else [f"height={height}", f"width={width}"]) + bins


def _code(*lines: str) -> list[str]:
    return ["```python", *lines, "```", ""]
