"""Prepared images and prompts checked against the teacher that they were encoded for."""

from __future__ import annotations

from pathlib import Path

from fewstep.data import ImageDataset, Prepared
from fewstep.system.errors import SettingsError
from fewstep.teachers import Teacher


def check_prepared(teacher: Teacher, prompts: Path | None, data: Prepared, dataset: ImageDataset) -> None:
    """Refuse images that were encoded for another model, or whose captions are other prompts.

    Raises:
        SettingsError: for either.
    """
    encoder, own = data.about()["encoder"], teacher.codec.sha256 if teacher.codec else "pixels"
    if encoder not in (own, "unknown"):
        raise SettingsError(
            f"the images in {data.path} were encoded by another VAE than teacher {teacher.name} has (sha256 {encoder[:8]}, "
            f"not {own[:8]}): prepare them again in another folder"
        )
    if dataset.class_names != tuple(teacher.conditioner.names):
        raise SettingsError(
            f"the captions of the images in {data.path} are not the prompts in {prompts}: prepare both in one folder "
            "(`fewstep prepare RECIPE --prompts FILE --images FOLDER`) and set prompts and data.path to it"
        )
