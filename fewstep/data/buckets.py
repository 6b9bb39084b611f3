"""Images of several sizes; every batch has one size. Knows no file format."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fewstep.data.dataset import ImageDataset
from fewstep.data.stream import Stream

__all__ = ["BucketStream", "Buckets", "Draw"]


@dataclass(frozen=True, eq=False)
class Buckets:
    """Images of several sizes, with one data set per size. All share labels and class names.

    Attributes:
        name: display name.
        parts: the data sets, none of them empty.
        sizes: height and width of the pictures of each part.
    """

    name: str
    parts: tuple[ImageDataset, ...]
    sizes: tuple[tuple[int, int], ...]

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return self.parts[0].num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label."""
        return self.parts[0].class_names

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all parts' fingerprints, in order."""
        return hashlib.sha256("".join(part.fingerprint for part in self.parts).encode()).hexdigest()

    def __len__(self) -> int:
        return sum(map(len, self.parts))


class Draw:
    """Random bucket of each iteration, in proportion to weights; a function of the seed and the iteration.

    Args:
        weights: weights of the buckets, not all 0.
        seed: random seed.
    """

    BLOCK = 4_096  # iterations per draw

    def __init__(self, weights: list[int], seed: int) -> None:
        self.seed = seed
        self._bounds = np.cumsum(weights) / sum(weights)
        self._before: list[NDArray[np.int64]] = [np.zeros(len(weights), np.int64)]
        self._block = lru_cache(maxsize=2)(self._drawn)

    def at(self, iteration: int) -> tuple[int, int]:
        """Bucket of an iteration, and the number of earlier iterations with the same bucket."""
        number, place = divmod(iteration, self.BLOCK)
        while len(self._before) <= number:
            last = len(self._before) - 1
            counts = np.bincount(self._block(last), minlength=len(self._bounds))
            self._before.append(self._before[last] + counts)
        block = self._block(number)
        bucket = int(block[place])
        return bucket, int(self._before[number][bucket] + np.count_nonzero(block[:place] == bucket))

    def _drawn(self, number: int) -> NDArray[np.int64]:
        shares = np.random.default_rng((self.seed, number)).random(self.BLOCK)
        return np.searchsorted(self._bounds, shares, side="right").astype(np.int64)


class BucketStream:
    """Batches by position in the run, with one bucket per iteration; same interface as `Stream`.

    Args:
        buckets: the images.
        draw: bucket of each iteration.
        batch_size: images per iteration.
        seed: seed of the order.
    """

    def __init__(self, buckets: Buckets, draw: Draw, batch_size: int, seed: int) -> None:
        self.draw, self.batch_size = draw, batch_size
        self.streams = [Stream(part, seed) for part in buckets.parts]

    def place(self, position: int) -> tuple[int, int]:
        """Bucket of a position in the run, and the position in that bucket's own order."""
        iteration, offset = divmod(position, self.batch_size)
        bucket, earlier = self.draw.at(iteration)
        return bucket, earlier * self.batch_size + offset

    def batch(self, position: int, size: int, then: int | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Stream.batch`; the images have the shape of the position's bucket."""
        bucket, start = self.place(position)
        found = self.streams[bucket].batch(start, size)
        if then is not None:
            following, start = self.place(then)
            self.streams[following].expect(start, size)
        return found

    def frames(self, position: int, size: int) -> Tensor | None:
        """See `Stream.frames`."""
        bucket, start = self.place(position)
        return self.streams[bucket].frames(start, size)
