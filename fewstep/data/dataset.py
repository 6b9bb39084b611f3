"""Interface of data sets: images with labels, which every kind of data loads. Knows no file format."""

from __future__ import annotations

import hashlib
import json
import struct
import tarfile
import zipfile
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Protocol, final

import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict
from torch import Tensor

from fewstep.system.bounds import shown
from fewstep.system.errors import DataError, UserError
from fewstep.system.tagged import Tagged

__all__ = ["DataSpec", "ImageDataset", "Images", "explained", "shuffled_indices", "to_uint8", "to_unit"]

# errors of the standard library and Pillow on damaged files (SyntaxError: broken PNG; TypeError, struct.error: broken EXIF)
_BAD_FILE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    NotImplementedError,
    RecursionError,
    TypeError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    tarfile.TarError,
    Image.DecompressionBombError,
)


@contextmanager
def explained(problem: str, way_out: str) -> Iterator[None]:
    """Convert a library's error on a damaged or missing file into `DataError("problem (cause): way out")`."""
    try:
        yield
    except DataError:  # already says what is wrong
        raise
    except UserError as error:
        raise DataError(f"{problem} ({error}): {way_out}") from None
    except _BAD_FILE as error:
        raise DataError(f"{problem} ({type(error).__name__}: {shown(str(error), quote=False)}): {way_out}") from error


def to_unit(images: Tensor) -> Tensor:
    """Convert pixel values 0..255 (uint8, any shape) to float32 in [-1, 1]: x / 127.5 - 1."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] (float, any shape) to uint8: x * 127.5 + 128, clipped to 0..255, fraction dropped.

    This is the quantisation of EDM's evaluation (Karras et al. 2022, github.com/NVlabs/edm, generate.py), so
    FIDs are comparable; it inverts `to_unit` exactly. Computed in float32, because bfloat16 cannot distinguish
    neighbouring pixel values. The caller must exclude NaN, which has no pixel value.
    """
    return (images.to(torch.float32) * 127.5 + 128).clip(0, 255).to(torch.uint8)


@lru_cache(maxsize=4)  # two streams (say data and evaluation), each across the border of two epochs
def _permutation(n: int, epoch: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))


def shuffled_indices(n: int, start: int, count: int, seed: int) -> Tensor:
    """Entries `start .. start + count - 1` of an endless shuffled sequence of 0..n-1, int64 [count].

    The sequence is one permutation after another; an epoch's permutation (position // n) depends only on (seed,
    epoch). There is no state, so a resumed run needs only the number of images seen.

    Raises:
        DataError: if n < 1, or start, count or seed is negative.
    """
    if n < 1 or start < 0 or count < 0 or seed < 0:
        raise DataError(
            f"n must be at least 1 and the others at least 0, got n={n}, start={start}, count={count}, seed={seed}"
        )
    pieces = [torch.empty(0, dtype=torch.int64)]
    position, stop = start, start + count
    while position < stop:
        epoch, first = divmod(position, n)
        last = min(n, first + stop - position)
        pieces.append(_permutation(n, epoch, seed)[first:last])
        position += last - first
    return torch.cat(pieces)  # a copy, which leaves the cached permutation unchanged


class Images(Protocol):
    """Images that are not a tensor: indexed like one along the first axis, decoded on demand."""

    shape: torch.Size

    def __getitem__(self, indices: Tensor | slice | int) -> Tensor:
        """uint8 [n, C, H, W], or latents in a float type."""


@final
@dataclass(frozen=True, eq=False)  # eq: tensors have no truth value, so datasets are equal only if identical
class ImageDataset:
    """N images of one shape, with or without class labels.

    Raises:
        DataError: on construction, if images, labels and classes do not fit together.
    """

    name: str
    """Display name, such as "fashion-mnist/train"."""
    images: Tensor | Images = field(repr=False)
    """uint8 [N, C, H, W], on the CPU. `Images` may also be latents, which are not rescaled."""
    labels: Tensor | None = field(default=None, repr=False)
    """int64 [N] in 0..num_classes-1; None: unlabelled."""
    num_classes: int = 0
    """0 if unlabelled."""
    class_names: tuple[str, ...] = ()
    """One name for each class."""
    frames: Tensor | None = field(default=None, repr=False)
    """int32 [N, 4]: height and width of the picture before it was resized and cropped, rows and columns that were cut off at the
    top and left of the resized one; None: not known."""
    source: str = field(default="", repr=False)
    """Replaces the pixels in the fingerprint if hashing them would be expensive; empty: hash the pixels."""

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if isinstance(self.images, Tensor) and (self.images.dtype != torch.uint8 or len(shape) != 4):
            raise DataError(f"{self.name}: images are {self.images.dtype} {list(shape)}. Try: give uint8 [N, C, H, W]")
        if 0 in shape:
            raise DataError(f"{self.name}: images of shape {list(shape)} hold no pixel. Try: give at least one image")
        if len(self.class_names) != self.num_classes:
            raise DataError(f"{self.name}: {len(self.class_names)} names for {self.num_classes} classes: give one each")
        if self.labels is None:
            if self.num_classes:
                raise DataError(f"{self.name}: {self.num_classes} classes but no labels. Try: give labels or 0 classes")
            return
        if self.labels.dtype != torch.int64 or self.labels.shape != shape[:1]:
            raise DataError(
                f"{self.name}: labels are {self.labels.dtype} {list(self.labels.shape)}. Try: give int64 [{shape[0]}]"
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.num_classes:
            raise DataError(
                f"{self.name}: labels go from {low} to {high}: with {self.num_classes} classes they "
                f"must lie in 0..{self.num_classes - 1}"
            )

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        _, c, h, w = self.images.shape
        return c, h, w

    def batch(self, indices: Tensor, flip: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Images and labels at `indices` (int64 [n]): float32 [n, C, H, W] in [-1, 1] (or latents), int64 [n] or None.

        `flip` (bool [n]) mirrors the chosen images left to right. The caller draws it, because the caller owns the
        random state.

        Raises:
            DataError: an image of a lazily decoded set is unreadable.
            IndexError: an index out of range.
        """
        stored = self.images[indices]
        images = stored.float() if stored.is_floating_point() else to_unit(stored)
        if flip is not None:
            images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        return images, None if self.labels is None else self.labels[indices]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the data, independent of their path; part of evaluation protocols.

        It covers the shape [N, C, H, W], the labels, the number of classes and the content. The content is the
        pixels for packaged data (Fashion-MNIST, digits); the sorted file names and sizes and the content of up to
        1,024 evenly spaced files for a folder; and names, sizes and CRC-32 for a zip. So a large folder is not read
        completely, and a file replaced by one with the same name and size may go unnoticed. Names of the dataset
        and its classes have no influence.
        """
        digest = hashlib.sha256(b"fewstep data 1\n")  # increment when the rule changes
        labelled = self.labels is not None
        digest.update(json.dumps([list(self.images.shape), self.num_classes, labelled, self.source]).encode())
        if self.labels is not None:
            digest.update(self.labels.cpu().numpy().astype("<i8").tobytes())
        if not self.source:
            for start in range(0, len(self), 4096):
                digest.update(self.images[start : start + 4096].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class DataSpec(Tagged):
    """Interface of a kind of data: the record of a run's `data:`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    kind: str

    @abstractmethod
    def load(self) -> ImageDataset:
        """Load images and labels.

        Raises:
            DataError: they are missing or damaged.
        """
