"""Training stream of a dataset: shuffled, optionally mirrored, with the next batch decoded in advance."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from fewstep.data.dataset import ImageDataset, shuffled_indices

__all__ = ["Stream"]


class Stream:
    """Batches by position in the run. The batch at a position depends only on the seed.

    Args:
        dataset: the images.
        seed: seed of the order and, with the position, of the mirroring.
        flip: mirror each image with probability one half.
    """

    def __init__(self, dataset: ImageDataset, seed: int, flip: bool = False) -> None:
        self.dataset, self.seed, self.flip = dataset, seed, flip
        self._pool = ThreadPoolExecutor(1)  # one: what reads files need not be fit for several at once
        self._coming: dict[tuple[int, int], Future[tuple[Tensor, Tensor | None]]] = {}

    def batch(self, position: int, size: int, then: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Images `position .. position + size - 1` of the run and their labels (None: the dataset has none).

        Asking twice for one place reads it once, unless another was asked for in between.

        Args:
            position: the first image's place.
            size: how many.
            then: the place that will be asked for next, with as many images: it is read meanwhile.

        Raises:
            DataError, OSError: they cannot be read; an image that is read ahead raises when its batch is asked for.
        """
        wanted = (position, size)
        ahead = () if then is None else ((then, size),)
        for key in (wanted, *ahead):
            self.expect(*key)
        for key in self._coming.keys() - {wanted, *ahead}:
            del self._coming[key]
        return self._coming[wanted].result()

    def expect(self, position: int, size: int) -> None:
        """Begin to read a batch that will be asked for."""
        if (position, size) not in self._coming:
            self._coming[position, size] = self._pool.submit(self._read, position, size)

    def frames(self, position: int, size: int) -> Tensor | None:
        """Height and width that each of these images had, and what was cut off at its top and left [size, 4]; None: not known."""
        if self.dataset.frames is None:
            return None
        return self.dataset.frames[shuffled_indices(len(self.dataset), position, size, self.seed)]

    def _read(self, position: int, size: int) -> tuple[Tensor, Tensor | None]:
        indices = shuffled_indices(len(self.dataset), position, size, self.seed)
        mirrored = None
        if self.flip:
            draws = [np.random.default_rng((self.seed, place)).random() for place in range(position, position + size)]
            mirrored = torch.tensor(draws) < 0.5
        return self.dataset.batch(indices, mirrored)
