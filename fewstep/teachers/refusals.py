"""Refusal of unsupported models by their configurations: other tasks, other conditions, other noise laws."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from fewstep.networks import FAMILIES
from fewstep.system.errors import TeacherError

__all__ = [
    "another_task",
    "is_flow",
    "refuse_other_conditions",
    "refuse_other_noise",
    "refuse_other_tasks",
    "refuse_unknown",
]


_VIDEO = {"num_frames", "video", "videos", "video_length", "video_latents", "control_video"}
_OF_UNETS = {  # components of the pipelines of Stable Diffusion and SDXL
    "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler", "safety_checker",
    "feature_extractor", "image_encoder",
}  # fmt: skip


def refuse_unknown(whose: str, index: Mapping[str, Any], network: str | None, loaded: Any, forward: Any) -> None:
    """Refuse a pipeline of a class that is not known here.

    Args:
        whose: its name, for the message.
        index: content of its model_index.json.
        network: class of its network; None if it has neither unet nor transformer.
        loaded: the pipeline's class; None if the library has none of that name.
        forward: `forward` of the network's class; None likewise.

    Raises:
        TeacherError: it makes something other than pictures from text, or its family has no entry.
    """
    kind, family = str(index.get("_class_name")), FAMILIES.get(str(network))
    # a class whose own library is missing takes anything
    called = (
        set() if loaded is None or hasattr(loaded, "_backends") else set(inspect.signature(loaded.__call__).parameters)
    )
    parts = {name for name, part in index.items() if isinstance(part, list | tuple) and len(part) == 2 and part[0]}
    more = parts - _OF_UNETS if family is not None and not family.pipelines else set()
    if family is not None and kind in family.pipelines:
        return
    what = None
    if called & _VIDEO or "Video" in kind:
        what = "makes videos: they are out of scope"
    elif any(name.startswith(("audio", "lyrics")) for name in called):
        what = "makes sound"
    elif called and "prompt" not in called and (family is None or family.encode is not None):
        what = "takes no prompt"
    if what is not None:
        raise TeacherError(f"{whose} must be a text-to-image model, got {kind}, which {what}")
    if family is not None and not family.pipelines and not more:
        return  # the configuration decides
    if family is not None:
        beside = f" ({', '.join(sorted(more))})" if more else ""
        why = f"its {network} is known, what {kind} gives it beside noise and text{beside} is not"
    else:
        inputs = [] if forward is None else list(inspect.signature(forward).parameters)[1:]
        given = [name for name in inputs if name not in ("return_dict", "attention_kwargs", "joint_attention_kwargs")]
        why = "it has neither unet nor transformer"
        if network is not None:
            why = (
                f"its {network} has no entry in fewstep/networks/families. An entry says how {kind} encodes prompts, scales "
                "latents, and calls the network: sign, time, layout of latents"
                + (f", and the inputs {', '.join(given)}" if given else "")
            )
    known = [name for entry in FAMILIES.values() for name in entry.pipelines]
    raise TeacherError(
        f"{whose} must be a pipeline that is known here, got {kind}: {why}. Known are Stable Diffusion, SDXL, DDPMPipeline, "
        f"{', '.join(known)}"
    )


def another_task(whose: str, taken: int, latents: int) -> str:
    """Message for a network with more input channels than its samples have."""
    task = {9: "an inpainting model", 8: "an editing model", 7: "an upscaler"}.get(taken, "a model with further inputs")
    return (
        f"{whose} must be a text-to-image model, got {task}: its network takes {taken} channels, the samples have {latents}. "
        "Try: the text-to-image model that it was made from"
    )


def refuse_other_tasks(whose: str, network: Mapping[str, Any], vae: Mapping[str, Any] | None, packed: int) -> None:
    """Refuse networks with inputs other than noisy samples and text: inpainting, editing, upscaling, refining.

    Args:
        whose: the pipeline's name, for the message.
        network: its configuration.
        vae: the VAE's; None if the pipeline works on pixels.
        packed: latents whose channels the network counts together (FLUX: 4).

    Raises:
        TeacherError: it is one of those.
    """
    channels = (
        (vae or {}).get("latent_channels")
        or (vae or {}).get("z_dim")
        or (network.get("out_channels") or network["in_channels"]) // packed
    )
    taken = network["in_channels"] // packed
    if taken != channels and (vae is not None or taken > channels):
        raise TeacherError(another_task(whose, taken, channels))
    if network.get("num_class_embeds"):
        raise TeacherError(
            f"the network of {whose} must take no class labels, got num_class_embeds {network['num_class_embeds']}: not known here"
        )


def refuse_other_conditions(whose: str, pipeline: str, network: Mapping[str, Any]) -> None:
    """Refuse UNets with conditions other than Stable Diffusion's and SDXL's.

    Args:
        whose: the pipeline's name, for the message.
        pipeline: class of the pipeline.
        network: its configuration.

    Raises:
        TeacherError: it is one of those (DeepFloyd IF, Kandinsky 2, Kolors, ...).
    """
    known = {"addition_embed_type": (None, "text_time"), "encoder_hid_dim_type": (None,), "class_embed_type": (None,)}
    for name, values in known.items():
        if network.get(name) not in values:
            raise TeacherError(
                f"{whose} must be a model of a family that is known here, got a {pipeline} whose {network.get('_class_name')} has "
                f"{name} {network[name]!r}: its conditions are not known. Try: Stable Diffusion, SDXL, or a fine-tune of one"
            )


def is_flow(scheduler: Any) -> bool:
    """Return whether a scheduler of diffusers is a rectified flow's."""
    return bool(scheduler.config.get("use_flow_sigmas")) or type(scheduler).__name__.startswith("FlowMatch")


def refuse_other_noise(scheduler: Any, whose: str) -> None:
    """Refuse a scheduler that neither has a noise table nor is a flow.

    Raises:
        TeacherError: it is one of those.
    """
    if type(scheduler).__name__ == "SCMScheduler":
        raise TeacherError(
            f"the teacher must be a model of many steps, got {whose} with SANA-Sprint's SCMScheduler: that is a student of one to "
            "four steps already, on TrigFlow's noise law, which is not known here. Try: the SANA model that it was distilled from"
        )
    if not is_flow(scheduler) and getattr(scheduler, "alphas_cumprod", None) is None:
        raise TeacherError(
            f"the scheduler of {whose} must have a noise table or be a flow, got {type(scheduler).__name__}: it has no "
            "alphas_cumprod, its noise law is not known here"
        )
