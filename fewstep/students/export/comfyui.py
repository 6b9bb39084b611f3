"""A ComfyUI workflow (API format) that samples a student with the settings it was trained for.

In ComfyUI the sampler `lcm` with the scheduler `simple` visits 999, 749, 499, 249 in four steps; `normal` does not.
"""

from __future__ import annotations

from typing import Any, Literal

from fewstep.diffusion.preconditioned import Prediction

__all__ = ["workflow"]


def workflow(
    kind: Literal["lora", "unet"],
    file: str,
    base: str,
    steps: int,
    size: tuple[int, int],
    prediction: Prediction,
    prompt: str,
    zero_snr: bool = False,
    clip_layer: int | None = None,
) -> dict[str, Any]:
    """Nodes by number.

    Args:
        kind: whether `file` is a LoRA or a whole UNet.
        file: its name in ComfyUI's models/loras or models/diffusion_models.
        base: name of the base model's file in models/checkpoints.
        steps: network calls.
        size: width and height of a picture.
        prediction: what the network predicts; v and x0 need a node that says so.
        prompt: the text to begin with.
        zero_snr: whether the noise table ends without signal; the same node says so.
        clip_layer: CLIP's layer that is read, counted from its end (-2); None: the program's own choice.
    """
    student = (
        _node("LoraLoaderModelOnly", model=["1", 0], lora_name=file, strength_model=1.0)
        if kind == "lora"
        else _node("UNETLoader", unet_name=file, weight_dtype="default")
    )
    nodes = {
        "1": _node("CheckpointLoaderSimple", ckpt_name=base),
        "2": student,
        "3": _node("CLIPTextEncode", clip=["1", 1], text=prompt),
        "4": _node("CLIPTextEncode", clip=["1", 1], text=""),
        "5": _node("EmptyLatentImage", width=size[0], height=size[1], batch_size=1),
        "6": _node(
            "KSampler", model=["2", 0], positive=["3", 0], negative=["4", 0], latent_image=["5", 0], seed=0, steps=steps,
            cfg=1.0, sampler_name="lcm", scheduler="simple", denoise=1.0,
        ),
        "7": _node("VAEDecode", samples=["6", 0], vae=["1", 2]),
        "8": _node("SaveImage", images=["7", 0], filename_prefix="fewstep"),
    }  # fmt: skip
    if prediction != "eps":
        sampling = {"v": "v_prediction", "x0": "x0"}[prediction]
        nodes["9"] = _node("ModelSamplingDiscrete", model=["2", 0], sampling=sampling, zsnr=zero_snr)
        nodes["6"]["inputs"]["model"] = ["9", 0]
    if clip_layer is not None:
        nodes["10"] = _node("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=clip_layer)
        for text in ("3", "4"):
            nodes[text]["inputs"]["clip"] = ["10", 0]
    return nodes


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
