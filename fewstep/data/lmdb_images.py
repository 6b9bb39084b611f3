"""DMD2's LMDB: one record of raw pixels per image, read on demand."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from fewstep.data.dataset import DataSpec, ImageDataset
from fewstep.data.image_files import spread
from fewstep.data.lmdb_check import check_lmdb
from fewstep.data.text import decode
from fewstep.system.bounds import reading
from fewstep.system.errors import DataError

__all__ = ["LmdbDataset", "TextLatents", "text_latents"]

_EAGER_BYTES = 2**30  # smaller sets are held as one tensor, as image files are
_MAX_CLASSES = 100_000
MOST_TEXT = 200  # bytes of a shape
_WAY_OUT = "give the folder that DMD2's ImageNet program makes or offers, with data.mdb in it"


@final
class LmdbDataset(DataSpec):
    """The ImageNet-64 set of DMD2 (Yin et al. 2024, https://github.com/tianweiy/DMD2): records `images_{i}_data` (uint8,
    C x H x W) and `labels_{i}_data` (int64), their shapes as text in `images_shape` and `labels_shape`. Needs the extra
    `lmdb`."""

    kind: Literal["lmdb"] = "lmdb"
    path: Path
    """The folder with data.mdb."""

    def load(self) -> ImageDataset:
        """Load images uint8 [N, C, H, W], above 1 GiB read batch by batch, and labels if the file has any.

        Raises:
            DataError: no such folder, no package `lmdb`, records that are missing or of another length.
        """
        path = self.path.expanduser()
        if not (path / "data.mdb").is_file():
            raise DataError(f"data.path {path} has no data.mdb in it: {_WAY_OUT}")
        file = _File(path)
        count, *shape = file.shape("images")
        if len(shape) != 3:
            raise DataError(f"{path} holds arrays of shape {shape}, not C x H x W: {_WAY_OUT}")
        labels, classes = None, 0
        if file.get("labels_shape") is not None:
            if file.shape("labels")[0] != count:
                raise DataError(f"{path} has {count} images and {file.shape('labels')[0]} labels: {_WAY_OUT}")
            labels = torch.tensor(
                [int.from_bytes(file.row("labels", i, 8), "little", signed=True) for i in range(count)]
            )
            low, classes = int(labels.min()), int(labels.max()) + 1
            if low < 0 or classes > _MAX_CLASSES:
                raise DataError(
                    f"{path} has labels from {low} to {classes - 1}: classes go from 0 to {_MAX_CLASSES - 1}"
                )
        images = _Rows(file, torch.Size([count, *shape]))
        source = [[count, *shape], images.fingerprint()]
        return ImageDataset(
            name=path.resolve().name,
            images=images[:] if images.shape.numel() <= _EAGER_BYTES else images,
            labels=labels,
            num_classes=classes,
            class_names=tuple(map(str, range(classes))),
            source=hashlib.sha256(json.dumps(source).encode()).hexdigest(),
        )


@dataclass(frozen=True)
class TextLatents:
    """Latents with captions, already encoded and scaled."""

    name: str
    images: _Rows
    """float16 [N, C, H, W]."""
    captions: list[str]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of captions and up to 1,024 images."""
        return hashlib.sha256(json.dumps([self.captions, self.images.fingerprint()]).encode()).hexdigest()


def text_latents(path: Path) -> TextLatents:
    """Read DMD2's text-to-image set: records `latents_{i}_data` (float16, scaled by the VAE's factor) and `prompts_{i}_data`.

    Raises:
        DataError: as `LmdbDataset.load`, or it holds no latents.
    """
    path = Path(path).expanduser()
    if not (path / "data.mdb").is_file():
        raise DataError(f"{path} has no data.mdb in it. Try: give the folder of DMD2's text-to-image LMDB")
    file = _File(path)
    count, *shape = file.shape("latents")
    captions = [
        decode(file.get(f"prompts_{index}_data") or b"", f"{path}, record prompts_{index}_data")
        for index in range(count)
    ]
    if "" in captions:
        raise DataError(
            f"{path}: record prompts_{captions.index('')}_data is missing or empty; make or fetch the file again"
        )
    return TextLatents(path.resolve().name, _Rows(file, torch.Size([count, *shape]), "latents", np.float16), captions)


class _File:
    """Records of one database by name and number."""

    def __init__(self, path: Path) -> None:
        try:
            lmdb = importlib.import_module("lmdb")
        except ImportError:
            raise DataError("data of kind lmdb needs the package lmdb: pip install 'fewstep[lmdb]'") from None
        self.path = path
        self.size = (path / "data.mdb").stat().st_size
        with reading(path / "data.mdb", DataError):
            check_lmdb(path / "data.mdb")
        try:
            # no lock file: many processes read, none writes, and the folder may be read-only
            self._transaction = lmdb.open(str(path), readonly=True, lock=False, readahead=False, create=False).begin()
        except lmdb.Error as error:
            raise DataError(f"{path}/data.mdb cannot be opened ({error}): {_WAY_OUT}") from None

    def get(self, key: str) -> bytes | None:
        with reading(self.path / "data.mdb", DataError):
            found: bytes | None = self._transaction.get(key.encode())
        return found

    def shape(self, name: str) -> list[int]:
        """Shape of all records together; its first number is their count."""
        text = (self.get(f"{name}_shape") or b"")[:MOST_TEXT]
        numbers = [int(part) for part in text.split() if part.isdigit()]
        if not numbers or len(numbers) != len(text.split()) or 0 in numbers:
            raise DataError(f"{self.path} has no usable {name}_shape ({text[:40]!r}): {_WAY_OUT}")
        if math.prod(numbers) > self.size:  # a number takes a byte or more, and nothing is packed
            raise DataError(
                f"{self.path} claims {name} of shape {numbers}, its file has {self.size:,} bytes: {_WAY_OUT}"
            )
        return numbers

    def row(self, name: str, index: int, size: int) -> bytes:
        blob = self.get(f"{name}_{index}_data")
        if blob is None or len(blob) != size:
            found = "is missing" if blob is None else f"has {len(blob)} bytes instead of {size}"
            raise DataError(f"{self.path}: record {name}_{index}_data {found}; make or fetch the file again")
        return blob


class _Rows:
    """Images, indexed like a tensor along the first axis."""

    def __init__(
        self, file: _File, shape: torch.Size, name: str = "images", dtype: type[np.generic] = np.uint8
    ) -> None:
        self._file, self.shape, self._name, self._dtype = file, shape, name, np.dtype(dtype)
        self._positions = torch.arange(shape[0])

    def fingerprint(self) -> str:
        """sha256 (hex) of the shape and of the content of up to 1,024 images, evenly spread: all have one size."""
        digest = hashlib.sha256(json.dumps([list(self.shape), str(self._dtype)]).encode())
        size = self.shape[1:].numel() * self._dtype.itemsize
        for index in spread(self.shape[0]):
            digest.update(self._file.row(self._name, index, size))
        return digest.hexdigest()

    def __getitem__(self, indices: Tensor | slice | int) -> Tensor:
        chosen = self._positions[indices]
        size = self.shape[1:].numel()
        pixels: np.ndarray[Any, np.dtype[Any]] = np.empty((chosen.numel(), size), self._dtype)
        for row, index in enumerate(chosen.reshape(-1).tolist()):
            pixels[row] = np.frombuffer(self._file.row(self._name, index, size * self._dtype.itemsize), self._dtype)
        return torch.from_numpy(pixels).reshape(*chosen.shape, *self.shape[1:])
