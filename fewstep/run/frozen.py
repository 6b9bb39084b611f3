"""Checks of a run's frozen network: few-step teachers, `teacher.quantize`, `train.swap_blocks`. Reads no weights."""

from __future__ import annotations

from collections.abc import Mapping

from fewstep.networks.lora import LoraSpec
from fewstep.networks.quantized import WHOLE, check_library
from fewstep.system.errors import SettingsError
from fewstep.teachers import DiffusersTeacher, TeacherSpec
from fewstep.training.spec import TrainSpec

__all__ = ["check_frozen"]


def check_frozen(
    teacher: TeacherSpec | None, trained: Mapping[str, LoraSpec | None], train: TrainSpec, distils: bool = True
) -> None:
    """Refuse unsupported settings before anything large is loaded.

    Args:
        teacher: the frozen network's settings; for a pretraining the pipeline's, if any.
        trained: setting of each trained network -> its adapters; None for whole weights.
        train: settings of the run.
        distils: whether there is a frozen network in addition to the trained ones.

    Raises:
        SettingsError: quantised weights that are to be trained or split, blocks to swap where none are frozen, or a library that
            is not installed.
        TeacherError: a few-step model is to be distilled.
    """
    if distils and isinstance(teacher, DiffusersTeacher):
        teacher.check_few_step()
    kind = teacher.quantize if isinstance(teacher, DiffusersTeacher) else None
    if kind is not None and not distils:
        raise SettingsError(
            f"pipeline.quantize must be null, got {kind}: a pretraining trains the weights themselves. Try: leave it out"
        )
    if kind is not None:
        if whole := [name for name, lora in trained.items() if lora is None]:
            raise SettingsError(WHOLE.format(kind=kind, whose=f"without {' and '.join(whole)}"))
        if train.mesh.splits:
            raise SettingsError(
                f"teacher.quantize must be null for networks that are split over processes, got {kind} and train.mesh.shard "
                f"{train.mesh.shard}. Try: train.mesh.shard 1"
            )
        check_library(kind)
    if train.swap_blocks and not distils:
        raise SettingsError(
            f"train.swap_blocks must be 0 where all weights are trained, got {train.swap_blocks}: no network is frozen. Try: "
            "train.offload"
        )
