"""The measured runs: shipped recipes with the settings that differ. Plain data."""

from __future__ import annotations

from typing import Any

__all__ = ["VARIANTS"]

LORA = "sdxl/lora-24gb"
ONE = {"train.batch_size": 1, "train.micro_batch": 1}  # an update of one forward: memory is the same, time is shorter
EIGHT_BITS = {"optim.generator.kind": "adamw8bit", "optim.critic.kind": "adamw8bit"}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FLUX2 = [*ATTENTION, "to_qkv_mlp_proj", "attn.to_out", "linear_in", "linear_out"]
Z_IMAGE = [*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]


def _micro(count: int) -> dict[str, Any]:
    return {"train.batch_size": count, "train.micro_batch": count}


def _flow(targets: list[str]) -> dict[str, Any]:
    """Four steps of a flow, adapters on the layers that are named."""
    return ONE | {
        "generator.timesteps": None, "generator.times": [1.0, 0.75, 0.5, 0.25], "generator.lora.targets": targets,
        "critic.lora.targets": targets,
    }  # fmt: skip


# (stage, name) -> recipe, network, settings that differ, the case's time limit in seconds
VARIANTS: dict[tuple[str, str], dict[str, Any]] = {
    (stage, name): {"recipe": recipe, "network": network, "settings": settings, "seconds": seconds}
    for stage, name, recipe, network, settings, seconds in [
        ("sdxl", "lora-24gb as shipped", LORA, "sdxl", {}, 90),
        ("sdxl", "micro-batch 1", LORA, "sdxl", ONE, 45),
        ("sdxl", "micro-batch 2", LORA, "sdxl", _micro(2), 45),
        ("sdxl", "micro-batch 4", LORA, "sdxl", _micro(4), 60),
        ("sdxl", "micro-batch 1, no recomputing", LORA, "sdxl", ONE | {"train.gradient_checkpointing": False}, 45),
        ("sdxl", "micro-batch 1, recomputing activations alone", LORA, "sdxl",
         ONE | {"train.gradient_checkpointing": False, "train.recompute_activations": True}, 45),
        ("sdxl", "micro-batch 1, int8 base", LORA, "sdxl", ONE | {"teacher.quantize": "int8"}, 60),
        ("sdxl", "micro-batch 1, NF4 base", LORA, "sdxl", ONE | {"teacher.quantize": "nf4"}, 60),
        ("sdxl", "micro-batch 1, 40 blocks at the host", LORA, "sdxl", ONE | {"train.swap_blocks": 40}, 60),
        ("others", "imagenet-64/dmd2, 40 images a card", "imagenet-64/dmd2", "adm", {"train.batch_size": 40}, 60),
        ("others", "cifar10-uncond/sid, 64 images a card", "cifar10-uncond/sid", "ddpmpp", {"train.batch_size": 64}, 60),
        ("others", "the same in TF32", "cifar10-uncond/sid", "ddpmpp",
         {"train.batch_size": 64, "train.precision": "tf32"}, 60),
        ("others", "sd15/dmd2, 32 images a card", "sd15/dmd2", "sd15", {"train.batch_size": 32}, 75),
        ("others", "FLUX.2-klein-4B shape, LoRA", LORA, "flux2-klein", _flow(FLUX2), 75),
        ("others", "Z-Image-6B shape, LoRA", LORA, "z-image", _flow(Z_IMAGE), 75),
        ("sdxl", "micro-batch 1, Adam in 8 bits", LORA, "sdxl", ONE | EIGHT_BITS, 120),
        ("sdxl", "sdxl/dmd2-4step, all weights, offloaded", "sdxl/dmd2-4step", "sdxl",
         {"train.batch_size": 1, "train.offload": True, "train.mesh.shard": 1}, 180),
    ]
}  # fmt: skip
