"""Fashion-MNIST, from a Debian package or downloaded, checked against the published sums."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import os
import struct
import urllib.request
from pathlib import Path
from typing import Literal, final

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate

from fewstep.data.dataset import DataSpec, ImageDataset, explained
from fewstep.system.errors import DataError
from fewstep.system.files import atomic_write, cache_folder

__all__ = ["FashionMNIST"]

# File -> sizes in its IDX header, and the sha256 of the *unpacked* file. Debian repacks the files without gzip's name
# and time fields, so its .gz files differ from the originals only in the header: restoring those fields gives the md5
# sums that torchvision checks, for all four files.
PUBLISHED: dict[str, tuple[tuple[int, ...], str]] = {
    "train-images-idx3-ubyte.gz": (
        (60000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train-labels-idx1-ubyte.gz": (
        (60000,),
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "t10k-images-idx3-ubyte.gz": (
        (10000, 28, 28),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        (10000,),
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
# The only mirror in torchvision. It has no https; the checksums protect.
_FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def installed_folder() -> Path:
    """Folder of the installed files: $FEWSTEP_DATA/fashion-mnist, by default that of Debian's dataset-fashion-mnist."""
    return Path(os.environ.get("FEWSTEP_DATA") or "/usr/share/datasets").expanduser() / "fashion-mnist"


@final
class FashionMNIST(DataSpec):
    """Fashion-MNIST: 60,000 (test: 10,000) grey 28x28 pictures of clothes in ten classes (Xiao, Rasul and
    Vollgraf 2017, arXiv:1708.07747)."""

    kind: Literal["fashion-mnist"] = "fashion-mnist"
    split: Literal["train", "test"] = "train"
    """The split to load."""
    root: Path | None = None
    """Folder with the four .gz files. It is searched first, then $FEWSTEP_DATA/fashion-mnist (default
    /usr/share/datasets/fashion-mnist, where the Debian package dataset-fashion-mnist puts them), then
    $FEWSTEP_CACHE/fashion-mnist (default ~/.cache/fewstep/fashion-mnist). A missing file is downloaded into
    `root`, or without one into the cache."""

    size: int = Field(28, ge=8, le=28)
    """Side in pixels; below 28 the pictures are downsampled (bilinear, antialiased, rounded to 8 bits)."""

    def load(self) -> ImageDataset:
        """Load images uint8 [60000 or 10000, 1, size, size] and labels 0..9.

        Raises:
            DataError: a file is not found and cannot be downloaded, or is not the published one.
        """
        prefix = "train" if self.split == "train" else "t10k"
        images = self._read(f"{prefix}-images-idx3-ubyte.gz").unsqueeze(1)
        if self.size < 28:
            images = interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        return ImageDataset(
            name=f"fashion-mnist/{self.split}" + (f"-{self.size}" if self.size < 28 else ""),
            images=images,
            labels=self._read(f"{prefix}-labels-idx1-ubyte.gz").to(torch.int64),
            num_classes=len(_FASHION_MNIST_CLASSES),
            class_names=_FASHION_MNIST_CLASSES,
        )

    def _read(self, file: str) -> Tensor:
        own = [] if self.root is None else [self.root.expanduser()]
        folders = [*own, installed_folder(), cache_folder() / "fashion-mnist"]
        target = own[0] if own else folders[-1]
        url = _FASHION_MNIST_URL + file
        way_out = f"run `apt-get install dataset-fashion-mnist`, or put {file} from {url} into {target}"

        for path in (folder / file for folder in folders):
            if path.is_file():
                with explained(f"{path} cannot be read", f"remove it, then {way_out}"):
                    return _unpack_idx(path.read_bytes(), file, str(path), f"remove it, then {way_out}")

        nowhere = f"{file} of Fashion-MNIST is not in {', '.join(map(str, folders))}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                blob = response.read(2**26)  # the largest has 26 MB
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"{nowhere}, and {url} cannot be downloaded ({error}): {way_out}") from error
        values = _unpack_idx(blob, file, url, way_out)
        with explained(f"{nowhere}, and the download cannot be stored in {target}", way_out):
            target.mkdir(parents=True, exist_ok=True)
            atomic_write(target / file, blob)  # other processes see the whole file or none
        return values


def _unpack_idx(blob: bytes, file: str, where: str, way_out: str) -> Tensor:
    """Read the values (uint8) of one of Fashion-MNIST's files: IDX (yann.lecun.com/exdb/mnist) packed with gzip."""
    sizes, sha256 = PUBLISHED[file]
    # Two zero bytes, 8 for "unsigned byte", the number of axes, then their sizes as big-endian uint32.
    header = struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes)
    length = len(header) + int(np.prod(sizes))
    with explained(f"{where} is damaged", way_out), gzip.open(io.BytesIO(blob)) as packed:
        content = packed.read(length + 1)  # never more, whatever it would unpack to
    if content[: len(header)] != header:
        raise DataError(
            f"{where} starts with {content[: len(header)].hex()}, not {header.hex()} (the magic number "
            f"and sizes {list(sizes)}), so it is not {file}: {way_out}"
        )
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"{where} unpacks to sha256 {found}, but the published file to {sha256}: {way_out}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=len(header)).reshape(sizes)
