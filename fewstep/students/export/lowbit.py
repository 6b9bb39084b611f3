"""Measure the error of a student with weights rounded to 8 bits, as other programs may load it, on a few samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.formats.model import load_generator
from fewstep.networks.lora import Adapted
from fewstep.networks.quantized import quantizable, rounded
from fewstep.students.export.facts import Facts
from fewstep.students.sample import FewStep
from fewstep.system.errors import SettingsError

__all__ = ["Rounded", "measure_rounding"]

WAYS: dict[str, Literal["cast", "float8", "int8"]] = {
    "float8 as ComfyUI and diffusers cast": "cast",
    "float8 with a scale a row": "float8",
    "int8": "int8",
}


@dataclass(frozen=True)
class Rounded:
    """Effect of rounding a student's weights.

    Attributes:
        errors: rounding method -> norm of the samples' change over the norm of the samples.
        samples: number of samples.
        dtype: dtype of the original weights.
    """

    errors: dict[str, float]
    samples: int
    dtype: str

    def __str__(self) -> str:
        numbers = ", ".join(f"{name} {100 * error:.2g} %" for name, error in self.errors.items())
        return (
            f"{numbers}: relative error of {self.samples} finished samples (latents) from equal noise, against {self.dtype} weights; "
            "linear layers and convolutions in blocks are rounded"
        )


@torch.no_grad()
def measure_rounding(facts: Facts, samples: int, device: torch.device) -> Rounded:
    """Draw samples with original and with rounded weights, with merged adapters.

    Memory: the network on the device, and a copy of its blocks on the host.

    Args:
        facts: the student's facts.
        samples: number of samples, from the first training prompts.
        device: compute device.

    Raises:
        SettingsError: the prepared prompts do not exist, or are too few.
        TeacherError, FileError: the teacher or the student cannot be read.
    """
    folder = facts.settings.prompts
    if folder is None or not folder.is_dir():
        raise SettingsError(
            f"--probes must be 0 without the prepared prompts of the run, got {samples}: {folder} is not there. Try: --probes 0"
        )
    teacher = facts.settings.model_copy(update={"quantize": None}).load()
    if samples > teacher.conditioner.num_classes:
        raise SettingsError(
            f"--probes must be at most the {teacher.conditioner.num_classes} prompts in {folder}, got {samples}"
        )
    teacher.denoiser.to(device)
    generator = load_generator(facts.file, None, teacher.player)[0].to(device).eval()
    denoiser = generator.denoiser
    if isinstance(denoiser, Adapted):
        for name, adapter in denoiser.adapters().items():
            weight = denoiser.base.get_submodule(name).get_parameter("weight")
            weight.copy_(weight.float() + adapter.product())
        generator.denoiser = denoiser.base
    cond = teacher.conditioner.cond(torch.arange(samples), samples)
    cond = {name: value.to(device) for name, value in cond.items()}

    def draw() -> Tensor:
        return FewStep(generator)(range(samples), teacher.shape, **cond).float()

    live = [layer.weight for layer in quantizable(generator.denoiser)]
    kept = [weight.cpu().clone() for weight in live]
    whole, errors = draw(), {}
    for name, way in WAYS.items():
        for used, original in zip(live, kept, strict=True):
            used.copy_(rounded(original.to(device), way))
        errors[name] = ((draw() - whole).norm() / whole.norm()).item()
    return Rounded(errors, samples, str(kept[0].dtype).removeprefix("torch."))
