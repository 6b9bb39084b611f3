"""CIFAR-10, from its authors' "python version" archive, read without unpickling anything but data."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch

from fewstep.data.dataset import DataSpec, ImageDataset, explained
from fewstep.system.bounds import read_file, regular_file, shown
from fewstep.system.data_pickle import DAMAGE, DataUnpickler, Record
from fewstep.system.errors import DataError

__all__ = ["Cifar10"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
BATCH_BYTES = 2**26  # of one batch file; the published ones have 31 MB


class _Reader(DataUnpickler):
    """The archive's pickles were written by Python 2 and hold one numpy array of bytes."""

    names: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): Record,
        ("numpy", "ndarray"): Record,
        ("numpy", "dtype"): Record,
    }
    what = "a CIFAR-10 batch"


@final
class Cifar10(DataSpec):
    """CIFAR-10: 50,000 (test: 10,000) colour 32x32 pictures in ten classes (Krizhevsky 2009)."""

    kind: Literal["cifar10"] = "cifar10"
    path: Path
    """The file cifar-10-python.tar.gz, or its unpacked folder cifar-10-batches-py."""
    split: Literal["train", "test"] = "train"
    """The split to load."""

    def load(self) -> ImageDataset:
        """Load images uint8 [N, 3, 32, 32] and labels 0..9.

        Raises:
            DataError: no such file or folder, or one that is damaged or holds something else.
        """
        names = ["test_batch"] if self.split == "test" else [f"data_batch_{number}" for number in range(1, 6)]
        batches = [_decoded(blob, where) for where, blob in self._files(names)]
        return ImageDataset(
            name=f"cifar10/{self.split}",
            images=torch.from_numpy(np.concatenate([images for images, _ in batches])),
            labels=torch.tensor([label for _, labels in batches for label in labels], dtype=torch.int64),
            num_classes=len(CLASSES),
            class_names=CLASSES,
        )

    def _files(self, names: list[str]) -> list[tuple[str, bytes]]:
        path = self.path.expanduser()
        way_out = f"give cifar-10-python.tar.gz from {PAGE}, or the folder in it"
        if not path.exists():
            raise DataError(f"data.path {path} does not exist: {way_out}")
        if path.is_dir():
            with explained(f"{path} is no CIFAR-10", way_out):
                return [(str(path / name), read_file(path / name, BATCH_BYTES)) for name in names]
        found = {}
        with (
            explained(f"{path} is damaged, or no .tar.gz file", way_out),
            tarfile.open(regular_file(path), "r:gz") as archive,
        ):
            for member in archive:
                name = Path(member.name).name
                if name in names and member.isfile() and member.size <= BATCH_BYTES:
                    stream = archive.extractfile(member)
                    found[name] = stream.read(BATCH_BYTES) if stream else b""
        missing = [name for name in names if name not in found]
        if missing:
            raise DataError(f"{path} has no {missing[0]} in it: {way_out}")
        return [(f"{path}/{name}", found[name]) for name in names]


def _decoded(blob: bytes, where: str) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], list[int]]:
    """Decode images uint8 [n, 3, 32, 32] and labels of one batch."""
    problem = f"{where} is no batch of CIFAR-10"
    try:
        batch = _Reader(io.BytesIO(blob), encoding="bytes").load()
        array, labels = batch[b"data"], batch[b"labels"]
        _, shape, _, fortran, pixels = array.state
        count, numbers = shape
        right = isinstance(pixels, bytes) and numbers == 3072 and len(pixels) == count * numbers and not fortran
        right = right and len(labels) == count and all(type(label) is int and 0 <= label < 10 for label in labels)
    except DAMAGE as error:
        raise DataError(
            f"{problem} ({type(error).__name__}: {shown(str(error), quote=False)}). Try: fetch it again from {PAGE}"
        ) from None
    if not right:
        raise DataError(f"{problem}: its pictures and labels do not fit together; fetch it again from {PAGE}")
    return np.frombuffer(pixels, np.uint8).reshape(count, 3, 32, 32).copy(), labels
