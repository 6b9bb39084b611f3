"""Folders of image files as a data set; classes from sub-folders or `dataset.json`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn, final

import torch
from pydantic import Field
from torch import Tensor

from fewstep.data import image_files
from fewstep.data.dataset import DataSpec, ImageDataset, explained
from fewstep.data.image_files import (
    Frame,
    LazyImages,
    check_endings,
    dataset_of,
    is_hidden,
    is_image,
    labels_from_json,
    no_images,
    too_large,
)
from fewstep.system.bounds import read_file, regular_file
from fewstep.system.errors import DataError

__all__ = ["ImageFolder", "list_files"]


@final
class ImageFolder(DataSpec):
    """PNG, JPEG and WEBP files anywhere below a folder; other and hidden files are ignored. An animation's
    first frame is used; photographs are rotated according to their EXIF tag.

    Labels: if the folder holds a dataset.json in EDM's layout, those. Otherwise, if the images lie in
    sub-folders, the sub-folders directly below the path, sorted by name, are the classes. Otherwise there are
    none.
    """

    kind: Literal["folder"] = "folder"
    path: Path
    """The folder."""
    size: Annotated[int, Field(ge=1, le=8192)] | None = None
    """Crop each image to its central square and resize it (Lanczos) to this size in pixels; null: no resizing, and
    all images must have one size."""
    channels: Literal[1, 3] = 3
    """3: colour; grey images get three equal channels. 1: grey; colours become their luminance."""

    background: Literal["white", "black", "grey"] | None = None
    """Colour behind transparent pixels; null: images with transparent pixels are refused."""
    leave_out: tuple[str, ...] = ()
    """Files that are not used, by their path in the folder, such as those that cannot be read (`fewstep init` finds them)."""

    def load(self) -> ImageDataset:
        """Images uint8 [N, channels, H, W], in the order of their sorted names; `LazyImages` above 1 GiB.

        Raises:
            DataError: no such folder, no image in it, an image that cannot be used (large sets: when it is
                first decoded), or labels that do not fit.
        """
        return self.framed(None)

    def framed(self, frame: Frame | None, about: str = "") -> ImageDataset:
        """The same with each picture brought to its form by `frame` instead of `size`; `about` tells frames apart in
        the fingerprint.

        Raises:
            DataError: as `load`.
        """
        root = self.path.expanduser()
        if not root.is_dir():
            found = "is a file" if root.exists() else "does not exist"
            raise DataError(f"data.path {root} {found}. Try: give a folder of images (for a zip file set kind: zip)")
        with explained(f"{root} cannot be listed", "make all of it readable"):
            files = sorted(list_files(root))
            if unknown := sorted(set(self.leave_out) - set(files)):
                raise DataError(f"data.leave_out must name files in {root}, got {unknown[0]}, which is not there")
            files = sorted(set(files) - set(self.leave_out))
            names = [name for name in files if is_image(name)]
            sizes = [regular_file(root / name).stat().st_size for name in names]
        if not names:
            raise no_images(root, files)
        check_endings(root, files)
        for name, size in zip(names, sizes, strict=True):
            if size > image_files.MAX_BYTES:
                raise too_large(f"{root}/{name}", size)

        table = root / "dataset.json"
        if table.exists():
            with explained(f"{table} cannot be read", "make it a readable file, or remove it"):
                if table.stat().st_size > image_files.MAX_BYTES:
                    raise too_large(str(table), table.stat().st_size)
                blob = read_file(table)
            labels, classes = labels_from_json(blob, str(table), names)
        else:
            labels, classes = _labels_from_folders(root, names)

        def read(name: str) -> bytes:
            return read_file(root / name, image_files.MAX_BYTES)

        form = None if frame or self.size is None else (self.size, self.size)
        images = LazyImages(str(root), names, read, self.channels, form, frame, self.background)
        behind = [f"on {self.background}"] if self.background else []
        source = [names, sizes, images.fingerprint(), *([about] if about else []), *behind]
        return dataset_of(root.resolve().name, images, labels, classes, source)


def list_files(root: Path) -> Iterator[str]:
    """Iterate over the names of all files that are not hidden, relative to `root`, with "/" on every system."""
    seen: dict[str, str] = {}

    def fail(error: OSError) -> NoReturn:
        raise error  # os.walk would skip a folder that it may not read

    # Links are followed, because subsets of classes are often made of them.
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in seen:
            raise DataError(
                f"{folder} and {seen[real]} are one folder, by a link, and its images would count twice. Try: remove it"
            )
        seen[real] = folder
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]
        prefix = Path(folder).relative_to(root)
        yield from ((prefix / file).as_posix() for file in files if not is_hidden(file))


def _labels_from_folders(root: Path, names: Sequence[str]) -> tuple[Tensor | None, tuple[str, ...]]:
    parents = [name.split("/")[0] if "/" in name else None for name in names]
    classes = sorted({parent for parent in parents if parent is not None})
    if not classes:
        return None, ()
    if None in parents:
        raise DataError(
            f"{root} has images both in sub-folders and outside of them, first "
            f"{names[parents.index(None)]}. Try: move those into a sub-folder, or label all in a dataset.json"
        )
    number = {name: k for k, name in enumerate(classes)}
    return torch.tensor([number[parent] for parent in parents if parent is not None]), tuple(classes)
