""".zip files of images as a data set, in EDM's layout."""

from __future__ import annotations

import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, final

from torch import Tensor

from fewstep.data import image_files
from fewstep.data.dataset import DataSpec, ImageDataset, explained
from fewstep.data.image_files import (
    LazyImages,
    check_endings,
    dataset_of,
    is_hidden,
    is_image,
    labels_from_json,
    no_images,
    too_large,
)
from fewstep.system.errors import DataError

__all__ = ["ZipDataset"]


@final
class ZipDataset(DataSpec):
    """A zip file as EDM's dataset_tool.py writes them: 8-bit grey or RGB images of one size, and at its top a
    dataset.json with the labels (none, or {"labels": null}: unlabelled). Nothing is unpacked to disk."""

    kind: Literal["zip"] = "zip"
    path: Path
    """The zip file."""

    def load(self) -> ImageDataset:
        """Load images uint8 [N, 1 or 3, H, W], in the order of their sorted names; `LazyImages` above 1 GiB.

        Raises:
            DataError: no such file, not a zip, no image in it, members that are encrypted, twice there or too
                large, an image that cannot be used (large sets: when it is first decoded), or labels that do
                not fit.
        """
        path = self.path.expanduser()
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else "does not exist"
            raise DataError(f"data.path {path} {found}. Try: give a zip file (for a folder of images set kind: folder)")
        with explained(f"{path} cannot be read as a zip file", "make or fetch it again"):
            archive = zipfile.ZipFile(path)
        members = {member.filename: member for member in archive.infolist() if not is_hidden(member.filename)}
        names = sorted(name for name in members if is_image(name))
        if not names:
            raise no_images(path, [name for name in members if not name.endswith("/")])
        check_endings(path, members)
        copies = Counter(member.filename for member in archive.infolist())
        for name in (*names, "dataset.json"):
            if name in members:
                check_member(f"{path}/{name}", members[name], copies[name])

        lock = threading.Lock()  # the decoding threads share one file, and zipfile promises nothing for that

        def read(name: str) -> bytes:
            # Bounded, because a member may claim to be smaller than what it unpacks to.
            with lock, archive.open(members[name]) as stream:
                return stream.read(image_files.MAX_BYTES)

        labels, classes = self._labels(path, members, names, read)
        images = LazyImages(str(path), names, read, channels=None, size=None)
        source = [[name, members[name].file_size, members[name].CRC] for name in names]
        return dataset_of(path.resolve().name, images, labels, classes, source)

    def _labels(
        self,
        path: Path,
        members: dict[str, zipfile.ZipInfo],
        names: Sequence[str],
        read: Callable[[str], bytes],
    ) -> tuple[Tensor | None, tuple[str, ...]]:
        if "dataset.json" in members:
            with explained(f"{path}/dataset.json cannot be read", "make or fetch the zip again"):
                blob = read("dataset.json")
            return labels_from_json(blob, f"{path}/dataset.json", names)
        nested = [name for name in members if name.endswith("/dataset.json")]
        if nested:  # a zip of the folder instead of its content: do not lose its labels silently
            raise DataError(
                f"{path} has {nested[0]}, but labels are read from dataset.json at its top: zip the content"
            )
        return None, ()


def check_member(where: str, member: zipfile.ZipInfo, copies: int) -> None:
    """Refuse a member that is there twice, encrypted, larger than `MAX_BYTES`, or packed in a way that no limit can stop."""
    if copies > 1:
        raise DataError(f"{where} is in the zip file {copies} times. Try: make the file again")
    if member.flag_bits & 1:
        raise DataError(f"{where} is encrypted. Try: make the zip file without a password")
    # other methods unpack a whole block at once, however large, before any limit can stop them
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{where} is packed by method {member.compress_type}: store or deflate it")
    if member.file_size > image_files.MAX_BYTES:
        raise too_large(where, member.file_size)
