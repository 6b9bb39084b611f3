"""Networks of the real shapes with random weights, and what a distillation of them is handed. Nothing is read or fetched."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data import ImageDataset
from fewstep.diffusion.denoiser import Cond
from fewstep.diffusion.noise import Discrete, RectifiedFlow, scaled_linear_alphas_cumprod
from fewstep.diffusion.preconditioned import Preconditioned
from fewstep.formats.edm import published_network
from fewstep.formats.model import DenoiserSpec
from fewstep.networks import DhariwalUNetSpec, DiffusersSpec, SongUNetSpec
from fewstep.run.specs import DistillRun
from fewstep.teachers import ClassLabels, Conditioner, DiffusersTeacher, Teacher
from fewstep.training.distill import Distillation, Setup

__all__ = ["distillation", "outline", "random_teacher"]

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
HUB = {"sdxl": "stabilityai/stable-diffusion-xl-base-1.0", "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
PROMPTS = 4
EDM_TINY = {"model_channels": 16, "num_blocks": 1, "attn_resolutions": (8,)}
SD15_TINY = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "block_out_channels": [16, 32], "layers_per_block": 1,
    "cross_attention_dim": 8, "attention_head_dim": 2, "norm_num_groups": 4,
}  # fmt: skip
# transformer/config.json of black-forest-labs/FLUX.2-klein-4B as we know it (3.88 billion weights), and Z-Image's, which are the
# defaults of its class (6.15 billion)
FLUX2 = {
    "patch_size": 1, "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 7680, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "guidance_embeds": False,
}  # fmt: skip
FLUX2_TINY = FLUX2 | {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
    "joint_attention_dim": 8, "axes_dims_rope": [2, 2, 2, 2],
}  # fmt: skip
Z_IMAGE = {"in_channels": 16, "dim": 3840, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560}
Z_IMAGE_TINY = {
    "in_channels": 16, "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 8,
    "axes_dims": [4, 2, 2],
}  # fmt: skip


def outline(name: str, tiny: bool) -> tuple[DenoiserSpec, dict[str, Tensor]]:
    """A network by its name, and the condition of one sample without storage.

    Args:
        name: sdxl, sd15, adm, ddpmpp, flux2-klein or z-image.
        tiny: a few thousand weights instead, of the same parts.
    """
    match name:
        case "adm":
            full = published_network("edm-imagenet-64x64-cond-adm.pkl")
            small = DhariwalUNetSpec(size=16, channels=3, num_classes=1000, channel_mult=(1, 2), **EDM_TINY)
            return _labelled(small if tiny else full)
        case "ddpmpp":
            full = published_network("edm-cifar10-32x32-uncond-vp.pkl")
            small = SongUNetSpec(size=16, channels=3, augment_dim=9, channel_mult=(1, 2), **EDM_TINY)
            return _labelled(small if tiny else full)
        case "flux2-klein":
            config, side, text = (FLUX2_TINY, 8, 4) if tiny else (FLUX2, 64, 512)
            shapes = {"text": (text, config["joint_attention_dim"])}
            return _flow("Flux2Transformer2DModel", config, side, config["in_channels"], shapes)
        case "z-image":
            config, side, text = (Z_IMAGE_TINY, 8, 4) if tiny else (Z_IMAGE, 128, 256)
            shapes = {"text": (text, config["cap_feat_dim"]), "mask": (text,)}
            return _flow("ZImageTransformer2DModel", config, side, config["in_channels"], shapes)
    if not tiny:
        return DiffusersTeacher(path=HUB[name]).outline()
    config, shapes = SD15_TINY, {"text": (77, SD15_TINY["cross_attention_dim"])}
    if name == "sdxl":
        config = json.loads((GOLDEN / "sdxl_tiny_unet.json").read_text())
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        shapes = {"text": (77, config["cross_attention_dim"]), "pooled": (pooled,), "time_ids": (6,)}
    spec = DiffusersSpec(config=config, height=8, width=8)
    schedule = Discrete(alphas_cumprod=scaled_linear_alphas_cumprod())
    return DenoiserSpec(net=spec, schedule=schedule, prediction="eps"), _meta(shapes)


def random_teacher(name: str, tiny: bool, device: torch.device, dtype: torch.dtype = torch.float32) -> Teacher:
    """A teacher whose weights were drawn on the device, in the type they are kept in.

    Args:
        name: of its network, as for `outline`.
        tiny: likewise.
        device: where it is made.
        dtype: of the frozen weights.
    """
    spec, cond = outline(name, tiny)
    if isinstance(spec.schedule, Discrete):
        spec = spec.model_copy(update={"prediction": "eps"})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            net = spec.net.build()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():  # what begins at zero would let no gradient through
                parameter.normal_(std=0.02)
    denoiser = Preconditioned(net, spec.schedule, spec.prediction, spec.sigma_data).requires_grad_(False).eval()

    def start() -> Preconditioned:
        return copy.deepcopy(denoiser).float().requires_grad_(True).train()

    classes = getattr(spec.net, "num_classes", 0)
    return Teacher(
        name=name,
        denoiser=denoiser,
        shape=tuple(spec.net.sample_shape),
        conditioner=Embeddings(cond) if isinstance(spec.net, DiffusersSpec) else ClassLabels(classes),
        student_spec=spec,
        start=start,
        bottleneck=spec.net.bottleneck,
    )


def distillation(run: DistillRun, teacher: Teacher) -> Distillation:
    """A run's task with this teacher, and random images where its method wants real ones."""
    real = random_images(teacher) if run.objective.needs_real else None
    return Distillation(
        Setup(
            teacher,
            run.generator.resolve(teacher.denoiser.schedule),
            run.objective,
            run.train,
            run.optim.generator,
            run.optim.critic,
            real,
            generator_lora=run.generator.lora,
            critic_lora=run.critic.lora,
        )
    )


class Embeddings(Conditioner):
    """Conditions of prompts that nobody wrote: normal numbers, ones for masks.

    Args:
        cond: of one sample, without storage.
    """

    def __init__(self, cond: Mapping[str, Tensor]) -> None:
        draw = torch.Generator().manual_seed(0)
        self.num_classes, self.names = PROMPTS, [f"prompt {number}" for number in range(PROMPTS)]
        self.rows = {
            name: torch.ones(PROMPTS + 1, *value.shape[1:], dtype=torch.int64)
            if name == "mask"
            else torch.randn(PROMPTS + 1, *value.shape[1:], generator=draw)
            for name, value in cond.items()
        }

    def cond(self, labels: Tensor | None, count: int) -> dict[str, Tensor]:
        labels = torch.full((count,), self.num_classes) if labels is None else labels
        self.check(labels)
        return {name: rows[labels] for name, rows in self.rows.items()}

    def null(self, cond: Cond) -> Cond:
        return {name: self.rows[name][-1].to(value).expand_as(value) for name, value in cond.items()}


class Latents:
    """Normal numbers in the place of encoded images, drawn when they are asked for."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.shape = torch.Size((count, *shape))

    def __getitem__(self, indices: Tensor) -> Tensor:
        return torch.randn(len(indices), *self.shape[1:], generator=torch.Generator().manual_seed(int(indices[0])))


def random_images(teacher: Teacher, count: int = 256) -> ImageDataset:
    """Real images that are none, with labels: bytes for networks on pixels, latents for others."""
    classes = teacher.conditioner.num_classes
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=draw) if classes else None
    if isinstance(teacher.conditioner, Embeddings):
        images: Any = Latents(count, teacher.shape)
    else:
        images = torch.randint(256, (count, *teacher.shape), dtype=torch.uint8, generator=draw)
    names = tuple(map(str, range(classes)))
    return ImageDataset("random", images, labels, classes, names, source="random")


def _labelled(net: DhariwalUNetSpec | SongUNetSpec | None) -> tuple[DenoiserSpec, dict[str, Tensor]]:
    assert net is not None
    labels = {"labels": torch.zeros(1, dtype=torch.int64, device="meta")} if net.num_classes else {}
    return DenoiserSpec(net=net), labels


def _flow(
    model: str, config: dict[str, Any], side: int, channels: int, shapes: dict[str, tuple[int, ...]]
) -> tuple[DenoiserSpec, dict[str, Tensor]]:
    net = DiffusersSpec(model=model, config=config, height=side, width=side, channels=channels)
    return DenoiserSpec(net=net, schedule=RectifiedFlow(shift=3.0), prediction="flow"), _meta(shapes)


def _meta(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.zeros(1, *shape, device="meta") for name, shape in shapes.items()}
