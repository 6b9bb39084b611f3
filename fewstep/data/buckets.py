"""Images of several sizes, of which every batch has one. Knows no file format."""

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
    """Images of several sizes, a data set for each. Labels and their names are the same in all.

    Attributes:
        name: for people.
        parts: none of them empty.
        sizes: height and width of a picture in each.
    """

    name: str
    parts: tuple[ImageDataset, ...]
    sizes: tuple[tuple[int, int], ...]

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return self.parts[0].num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name for each label."""
        return self.parts[0].class_names

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what all parts are, in their order."""
        return hashlib.sha256("".join(part.fingerprint for part in self.parts).encode()).hexdigest()

    def __len__(self) -> int:
        return sum(map(len, self.parts))


class Draw:
    """Choose a bucket for each iteration, at random in proportion to weights; a function of the seed and the iteration.

    Args:
        weights: of the buckets, not all 0.
        seed: of the choice.
    """

    BLOCK = 4_096  # iterations that are drawn at once

    def __init__(self, weights: list[int], seed: int) -> None:
        self.seed = seed
        self._bounds = np.cumsum(weights) / sum(weights)
        self._before: list[NDArray[np.int64]] = [np.zeros(len(weights), np.int64)]
        self._block = lru_cache(maxsize=2)(self._drawn)

    def at(self, iteration: int) -> tuple[int, int]:
        """The bucket of an iteration, and how many iterations before it had the same."""
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
    """Batches by their place in the run, every iteration's from one bucket; the interface of `Stream`.

    Args:
        buckets: where the images are.
        draw: which bucket an iteration has.
        batch_size: images of an iteration.
        seed: of the order.
    """

    def __init__(self, buckets: Buckets, draw: Draw, batch_size: int, seed: int) -> None:
        self.draw, self.batch_size = draw, batch_size
        self.streams = [Stream(part, seed) for part in buckets.parts]

    def place(self, position: int) -> tuple[int, int]:
        """The bucket of a place of the run, and the place in that bucket's own order."""
        iteration, offset = divmod(position, self.batch_size)
        bucket, earlier = self.draw.at(iteration)
        return bucket, earlier * self.batch_size + offset

    def batch(self, position: int, size: int, then: int | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Stream.batch`; the images have the shape of the place's bucket."""
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
