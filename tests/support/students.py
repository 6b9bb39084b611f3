"""Text-to-image students that were not trained: their files as a distillation would write them."""

import torch

from fewstep.diffusion.generator import Generator
from fewstep.formats.model import save_generator
from fewstep.networks.lora import LoraSpec


def made_student(spec, folder, times, lora=None, seed=0):
    """Save a student of a teacher, its weights moved enough to be seen; returns its folder.

    Args:
        spec: of the teacher, without prompts.
        folder: where to write `student.safetensors`.
        times: normalised times, or timesteps (whole numbers above 1) of a table.
        lora: settings of its adapters; None: the whole network is moved.
    """
    teacher = spec.load()
    provenance = {"teacher": spec.path, "run": {"teacher": spec.model_dump(mode="json", exclude_none=True)}}
    player = teacher.player(None if lora is None else LoraSpec(**lora)).requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for value in player.parameters():
            value += 0.1 * value.std().clamp(min=0.3) * torch.randn_like(value) if lora is None else 0
            if lora is not None:
                value.normal_(std=0.3)
    if max(times) > 1:
        times = [step / (len(teacher.denoiser.schedule.alphas_cumprod) - 1) for step in times]
    folder.mkdir(parents=True, exist_ok=True)
    save_generator(
        folder / "student.safetensors", Generator(player, times), teacher.student_spec, provenance | {"images": 8}
    )
    return folder
