"""ComfyUI workflows (API format) that sample a student with the settings of its training.

In ComfyUI the sampler `lcm` renoises each prediction, and the scheduler `simple` picks equal steps of the model's table:
999, 749, 499, 249 in four steps; `normal` does not.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from fewstep.diffusion.noise import Discrete, RectifiedFlow
from fewstep.students.export.facts import Facts
from fewstep.teachers.facts import zero_snr

__all__ = ["NO_CLASS", "OTHER_NAMES", "READS_NETWORK", "Kind", "obstacle", "workflow"]

Kind = Literal["lora", "network", "checkpoint"]

READS_NETWORK = ("UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel")
"""Networks that ComfyUI loads with diffusers' names, and that have a workflow here."""
NO_CLASS = ("SanaTransformer2DModel",)
"""Networks without a class in ComfyUI."""
OTHER_NAMES = ("Lumina2Transformer2DModel",)
"""Networks whose layers ComfyUI knows by names other than diffusers' alone: a LoRA is for diffusers."""
_TABLE = 1000  # levels that `simple` chooses from
_FLUX_TABLE = 10_000
_LATENTS = {  # of comfy/latent_formats.py; the VAE's configuration is not read there
    "UNet2DConditionModel": {"scaling_factor": 0.18215},
    "SDXL": {"scaling_factor": 0.13025},
    "SD3Transformer2DModel": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "FluxTransformer2DModel": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
}


def obstacle(facts: Facts) -> str | None:
    """Reason why no workflow can be written; None if one can.

    Args:
        facts: the student's facts.
    """
    if facts.net.model not in READS_NETWORK:
        if facts.net.model in NO_CLASS:
            return f"ComfyUI has no class for a {facts.net.model}"
        return f"there is no workflow for a {facts.net.model} here"
    own_scale = _LATENTS["SDXL" if facts.sdxl else facts.net.model]
    changed = facts.settings.latents.config()
    if any(own_scale.get(name) != value for name, value in changed.items()):
        return f"ComfyUI scales this kind of model's latents by {own_scale}, this student was trained with {changed}"
    if isinstance(facts.schedule, RectifiedFlow):
        table = _FLUX_TABLE if facts.net.model == "FluxTransformer2DModel" else _TABLE
        visited = [1 - int(step * table / facts.steps) / table for step in range(facts.steps)]
        if any(abs(own - other) > 0.5 / _TABLE for own, other in zip(facts.times, visited, strict=True)):
            return f"ComfyUI's scheduler `simple` visits the times {visited}, this student was trained at {list(facts.times)}"
        return None
    visited = [_TABLE - 1 - int(step * _TABLE / facts.steps) for step in range(facts.steps)]
    if visited != facts.timesteps:
        return f"ComfyUI's scheduler `simple` visits {visited}, this student was trained at {facts.timesteps}"
    if not _usual_table(facts):
        return (
            "ComfyUI has one noise table for this kind of model (beta from 0.00085 to 0.012, scaled linear), and this student was "
            "trained with another"
        )
    return None


def workflow(facts: Facts, kind: Kind, file: str, base: str) -> dict[str, Any]:
    """Make the workflow: nodes by number.

    Args:
        facts: of the student; `obstacle` is None.
        kind: whether `file` is a LoRA, a whole network, or a checkpoint with network, VAE and text encoders.
        file: its name in ComfyUI's models/loras, models/diffusion_models or models/checkpoints.
        base: name of the base model's file in models/checkpoints, for transformers in models/diffusion_models; empty: after the
            teacher's own name.
    """
    height, width = facts.picture
    base = base or f"{facts.base_name}.safetensors"
    student = (
        _node("LoraLoaderModelOnly", model=["1", 0], lora_name=file, strength_model=1.0)
        if kind == "lora"
        else _node("UNETLoader", unet_name=file, weight_dtype="default")
    )
    nodes = {
        "1": _node("CheckpointLoaderSimple", ckpt_name=base),
        "2": student,
        "3": _node("CLIPTextEncode", clip=["1", 1], text=facts.prompt),
        "4": _node("CLIPTextEncode", clip=["1", 1], text=""),
        "5": _node("EmptyLatentImage", width=width, height=height, batch_size=1),
        "6": _node(
            "KSampler", model=["2", 0], positive=["3", 0], negative=["4", 0], latent_image=["5", 0], seed=0, steps=facts.steps,
            cfg=1.0, sampler_name="lcm", scheduler="simple", denoise=1.0,
        ),
        "7": _node("VAEDecode", samples=["6", 0], vae=["1", 2]),
        "8": _node("SaveImage", images=["7", 0], filename_prefix="fewstep"),
    }  # fmt: skip
    if kind == "checkpoint":
        nodes["1"] = _node("CheckpointLoaderSimple", ckpt_name=file)
        del nodes["2"]
        nodes["6"]["inputs"]["model"] = ["1", 0]
    if facts.unet:
        _of_unets(nodes, facts)
    else:
        _of_transformers(nodes, facts, kind, base)
    return nodes


def _of_unets(nodes: dict[str, Any], facts: Facts) -> None:
    if facts.prediction != "eps":
        sampling = {"v": "v_prediction", "x0": "x0"}[facts.prediction]
        nodes["9"] = _node(
            "ModelSamplingDiscrete",
            model=nodes["6"]["inputs"]["model"],
            sampling=sampling,
            zsnr=zero_snr(facts.schedule),
        )
        nodes["6"]["inputs"]["model"] = ["9", 0]
    skipped = facts.settings.text.clip_skip
    if skipped is not None:  # ComfyUI's count: -1 is the last layer; SDXL reads the one before by itself
        layer = -(skipped + (2 if facts.sdxl else 1))
        nodes["10"] = _node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=layer)
        for text in ("3", "4"):
            nodes[text]["inputs"]["clip"] = ["10", 0]


def _of_transformers(nodes: dict[str, Any], facts: Facts, kind: str, base: str) -> None:
    """Add nodes of transformers: separate files per component; the shift and FLUX's guidance are nodes."""
    assert isinstance(facts.schedule, RectifiedFlow), "the transformers with a workflow are flows"
    height, width = facts.picture
    if kind == "lora":
        nodes["1"] = _node("UNETLoader", unet_name=base, weight_dtype="default")
    else:
        del nodes["1"]
    flux = facts.net.model == "FluxTransformer2DModel"
    if flux:
        nodes["11"] = _node(
            "DualCLIPLoader", clip_name1="t5xxl_fp16.safetensors", clip_name2="clip_l.safetensors", type="flux"
        )
    else:
        names = (
            ("clip_l", "clip_g") if "text_encoder_3" in facts.settings.without else ("clip_l", "clip_g", "t5xxl_fp16")
        )
        files = {f"clip_name{number}": f"{name}.safetensors" for number, name in enumerate(names, 1)}
        loader = "TripleCLIPLoader" if len(names) == 3 else "DualCLIPLoader"
        nodes["11"] = _node(loader, **files, **({"type": "sd3"} if len(names) == 2 else {}))
    nodes["12"] = _node("VAELoader", vae_name="ae.safetensors" if flux else "sd3_vae.safetensors")
    nodes["5"]["class_type"] = "EmptySD3LatentImage"
    for text in ("3", "4"):
        nodes[text]["inputs"]["clip"] = ["11", 0]
    nodes["7"]["inputs"]["vae"] = ["12", 0]
    nodes["6"]["inputs"]["model"] = ["9", 0]
    if flux:
        mu = math.log(facts.schedule.shift)
        nodes["9"] = _node("ModelSamplingFlux", model=["2", 0], max_shift=mu, base_shift=mu, width=width, height=height)
        guidance = facts.settings.guidance_input
        if facts.family.guided_inside(facts.net.config):
            nodes["10"] = _node(
                "FluxGuidance", conditioning=["3", 0], guidance=facts.family.guidance if guidance is None else guidance
            )
            nodes["6"]["inputs"]["positive"] = ["10", 0]
    else:
        nodes["9"] = _node("ModelSamplingSD3", model=["2", 0], shift=facts.schedule.shift)


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _usual_table(facts: Facts) -> bool:
    """Return whether the noise table is Stable Diffusion's, rescaled or not."""
    import diffusers

    assert isinstance(facts.schedule, Discrete)
    usual = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=zero_snr(facts.schedule),
    )
    table = torch.tensor(facts.schedule.alphas_cumprod)
    return len(table) == len(usual.alphas_cumprod) and torch.allclose(table, usual.alphas_cumprod, atol=1e-5)
