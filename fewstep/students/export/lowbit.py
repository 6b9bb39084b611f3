"""Error of a student whose weights are rounded to 8 bits, as programs that load it may do: measured on a few samples."""

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
    """What rounding a student's weights changes.

    Attributes:
        errors: how the weights are rounded -> norm of the samples' change over the norm of the samples.
        samples: that were drawn.
        dtype: of the weights before.
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
    """Draw samples with whole and with rounded weights, adapters merged.

    Memory: the network on the device, and its blocks once more at the host.

    Args:
        facts: of the student.
        samples: how many, of the first prompts that it was trained with.
        device: where to draw.

    Raises:
        SettingsError: the prepared prompts are not there, or are fewer.
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
