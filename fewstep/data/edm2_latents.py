"""EDM2's latents of ImageNet as a data set: a .zip file of arrays, each with the means and deviations of one picture's latent."""

from __future__ import annotations

import hashlib
import io
import json
import math
import threading
import zipfile
from pathlib import Path
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from fewstep.data.dataset import DataSpec, ImageDataset, explained
from fewstep.data.image_files import MAX_BYTES, labels_from_json
from fewstep.data.zips import check_member
from fewstep.system.bounds import reading, shown
from fewstep.system.errors import DataError

__all__ = ["EDM2Latents", "from_raw", "to_raw"]

# mean and deviation of each channel of Stable Diffusion's latents of ImageNet-512; the networks see deviation 0.5
MEAN, STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)


def from_raw(latents: Tensor) -> Tensor:
    """Latents [..., 4, H, W] of the VAE, not scaled -> samples with mean 0 and deviation 0.5."""
    mean, std = (latents.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (latents - mean) / std * 0.5


def to_raw(samples: Tensor) -> Tensor:
    """Inverse of `from_raw`."""
    mean, std = (samples.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return samples / 0.5 * std + mean


@final
class EDM2Latents(DataSpec):
    """A zip file as EDM2's dataset_tool.py encodes pictures (`img512-sd.zip`): arrays [8, H, W], the means and deviations of 4
    channels, and a dataset.json with the labels. The noise of a latent is drawn from its number: the same in each epoch."""

    kind: Literal["edm2-latents"] = "edm2-latents"
    path: Path
    """The zip file."""

    def load(self) -> ImageDataset:
        """Samples float [N, 4, H, W] with deviation 0.5, read when they are needed.

        Raises:
            DataError: no such file, no zip, no or other arrays in it, or labels that do not fit.
        """
        path = self.path.expanduser()
        if not path.is_file():
            raise DataError(f"data.path {path} must be a zip file of latents, got no file")
        with explained(f"{path} cannot be read as a zip file", "fetch or make it again"):
            archive = zipfile.ZipFile(path)
        members = {member.filename: member for member in archive.infolist()}
        names = sorted(name for name in members if name.endswith(".npy"))
        if not names or "dataset.json" not in members:
            raise DataError(
                f"{path} must hold .npy files and dataset.json at its top, got {len(names)} and "
                f"{'one' if 'dataset.json' in members else 'none'}. Try: data: {{kind: zip}} for pictures"
            )
        for name in (*names, "dataset.json"):
            check_member(f"{path}/{name}", members[name], 1)
        rows = _Rows(path, archive, names)
        with explained(f"{path}/dataset.json cannot be read", "fetch or make the zip again"):
            blob = _unpacked(archive, "dataset.json")
        labels, classes = labels_from_json(blob, f"{path}/dataset.json", names)
        source = [[name, members[name].file_size, members[name].CRC] for name in names]
        digest = hashlib.sha256(json.dumps(source).encode()).hexdigest()
        return ImageDataset(path.resolve().name, rows, labels, len(classes), classes, source=digest)


def _unpacked(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as stream:  # bounded, because a member may claim to be smaller than what it unpacks to
        return stream.read(MAX_BYTES)


def _check_size(blob: bytes) -> None:
    """Refuse an array whose header claims more than the bytes present, before memory is taken."""
    stream = io.BytesIO(blob)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    if math.prod(shape) * dtype.itemsize > len(blob):
        raise ValueError(f"it claims {shown(shape)} numbers in {len(blob):,} bytes")


class _Rows:
    """The arrays of a zip file, indexed like one tensor along the first axis."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, names: list[str]) -> None:
        self._path, self._archive, self._names = path, archive, names
        self._lock, self._positions = threading.Lock(), torch.arange(len(names))
        self.shape = torch.Size((len(names), *self._row(0).shape))

    def __getitem__(self, indices: Tensor | slice | int) -> Tensor:
        chosen = self._positions[indices]
        rows = [self._row(number) for number in chosen.reshape(-1).tolist()]
        stacked = torch.stack(rows) if rows else torch.empty(0, *self.shape[1:])
        return stacked.reshape(*chosen.shape, *self.shape[1:])

    def _row(self, number: int) -> Tensor:
        name = self._names[number]
        with reading(f"{self._path}/{name}", DataError):
            with self._lock:
                blob = _unpacked(self._archive, name)
            _check_size(blob)
            array = np.load(io.BytesIO(blob), allow_pickle=False)
        if array.ndim != 3 or array.shape[0] != 8 or array.dtype.kind != "f":
            raise DataError(
                f"{self._path}/{name} must be numbers [8, H, W], means and deviations, got {array.dtype} {list(array.shape)}"
            )
        if number and array.shape[1:] != self.shape[2:]:
            raise DataError(
                f"{self._path}/{name} must have the size of the first array, {list(self.shape[2:])}, got {list(array.shape[1:])}"
            )
        mean, std = torch.from_numpy(array.astype(np.float32)).chunk(2)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(number))
        return from_raw(mean + std * noise)
