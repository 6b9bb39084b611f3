"""Check prepared images and prompts against their teacher."""

from __future__ import annotations

from pathlib import Path

from fewstep.data import Buckets, ImageDataset, Prepared
from fewstep.system.errors import SettingsError
from fewstep.teachers import Teacher


def prepared_images(teacher: Teacher, prompts: Path | None, data: Prepared) -> ImageDataset | Buckets:
    """The images of a prepared folder, in buckets if the teacher has any.

    Raises:
        DataError: nothing prepared there, or not in buckets as the teacher has them.
        SettingsError: images that were encoded for another model, whose captions are other prompts, or of another size.
    """
    if not teacher.sizes:
        dataset = data.load()
        check_prepared(teacher, prompts, data, dataset)
        return dataset
    buckets = data.load_buckets()
    check_prepared(teacher, prompts, data, buckets)
    own = {view.picture_shape[1:] for view in teacher.sizes}
    if other := [size for size in buckets.sizes if size not in own]:
        height, width = other[0]
        raise SettingsError(
            f"teacher.buckets must be those that {data.path} was prepared with, got none of {width} x {height} pixels. Try: the "
            "same settings as in `fewstep prepare`"
        )
    return buckets


def check_prepared(teacher: Teacher, prompts: Path | None, data: Prepared, dataset: ImageDataset | Buckets) -> None:
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
