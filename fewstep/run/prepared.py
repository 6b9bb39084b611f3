"""Check prepared images and prompts against their teacher."""

from __future__ import annotations

from pathlib import Path

from fewstep.data import ImageDataset, Prepared
from fewstep.system.errors import SettingsError
from fewstep.teachers import Teacher


def check_prepared(teacher: Teacher, prompts: Path | None, data: Prepared, dataset: ImageDataset) -> None:
    """Refuse images that were encoded for another model, or whose captions differ from the prompts.

    Raises:
        SettingsError: either is the case.
    """
    encoder, own = data.about()["encoder"], teacher.codec.sha256 if teacher.codec else "pixels"
    if encoder not in (own, "unknown"):
        raise SettingsError(
            f"the images in {data.path} must be encoded by the VAE of teacher {teacher.name} (sha256 {own[:8]}), got another "
            f"(sha256 {encoder[:8]}). Try: prepare them again in another folder"
        )
    if dataset.class_names != tuple(teacher.conditioner.names):
        raise SettingsError(
            f"the captions of the images in {data.path} must be among the prompts in {prompts}, got others. Try: prepare both in "
            "one folder (`fewstep prepare RECIPE --prompts FILE --images FOLDER`) and set prompts and data.path to it"
        )
