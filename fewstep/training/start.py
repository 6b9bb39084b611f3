"""Initial weights of a distillation from another run or a generator's file instead of the teacher.

This is DMD2's second stage: its best ImageNet-64 and Stable Diffusion models add a GAN, at a smaller learning rate, after
training without one. Optimizers start from scratch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.formats.dmd2 import dmd2_file, load_dmd2_critic
from fewstep.formats.model import load_denoiser, read_generator_weights
from fewstep.system.checkpoint import Checkpoints
from fewstep.system.errors import FileError
from fewstep.system.weights import first_not_finite

__all__ = ["read_start"]


def read_start(path: Path) -> dict[str, Any]:
    """Read weights by name, for `Distillation.begin`.

    Args:
        path: a run folder of `fewstep distill` (its newest checkpoint, averaged weights), one of its checkpoints
            (`FOLDER/checkpoints/N`), a student (a .safetensors file, the folder of `fewstep import`, a SiD .pkl file), or a
            checkpoint folder of DMD2, including fake score and GAN head.

    Raises:
        FileError, OSError: nothing to start from, or it cannot be read.
    """
    path = Path(path)
    checkpoint = path if (path / "manifest.json").exists() else None
    if checkpoint is None and (path / "checkpoints").is_dir():
        checkpoint = Checkpoints(path / "checkpoints").latest()
    if checkpoint is not None:
        state = Checkpoints(checkpoint.parent).load(checkpoint, only=("task",))["task"]
        if "generator" not in state:
            raise FileError(f"{checkpoint} must be of a distillation, got a pretraining. Try: a student or its run")
        for part in ("ema", "generator", "critic"):
            if (bad := first_not_finite(state.get(part, {}))) is not None:
                raise FileError(f"{checkpoint} must hold finite weights, got NaN or infinite numbers in {part} {bad}")
        # averaged weights: the last trained ones are noisy if the learning rates were constant
        return {"generator": state.get("ema", state["generator"])} | (
            {"critic": state["critic"]} if "critic" in state else {}
        )
    if (path / "student.safetensors").exists():
        path = path / "student.safetensors"
    if not dmd2_file(path) and (path.is_dir() or not path.exists()):
        raise FileError(
            f"nothing to start from at {path}. Try: a run folder of `fewstep distill` with a checkpoint, one of its "
            "checkpoints, or a student's file"
        )
    ours = path.suffix == ".safetensors"  # read_generator_weights refuses a teacher
    tensors = read_generator_weights(path) if ours else load_denoiser(path)[0].state_dict()
    state = {"generator": {f"denoiser.{name}": value for name, value in tensors.items()}}
    critic = load_dmd2_critic(path)
    return state if critic is None else state | {"critic": critic}
