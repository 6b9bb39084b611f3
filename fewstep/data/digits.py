"""Scikit-learn's 8x8 digits: real images for tests, without a download."""

from __future__ import annotations

from typing import Literal, final

import torch

from fewstep.data.dataset import DataSpec, ImageDataset
from fewstep.system.errors import DataError

__all__ = ["Digits"]


@final
class Digits(DataSpec):
    """The 1,797 handwritten digits, grey 8x8, shipped with scikit-learn (Alpaydin and Kaynak 1998,
    archive.ics.uci.edu/dataset/80); needs no download."""

    kind: Literal["digits"] = "digits"
    split: Literal["all", "train", "test"] = "all"
    """test: every fifth image (359), train: the others (1,438). fewstep's own split: the data set has none."""

    def load(self) -> ImageDataset:
        """Load images uint8 [1797, 1, 8, 8] (of a split, fewer), with values 0..16 scaled to 0..255, and labels 0..9.

        Raises:
            DataError: scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                "the digits need scikit-learn, which is not installed. Try: pip install 'fewstep[digits]'"
            ) from error
        digits = load_digits()
        pixels = torch.from_numpy(digits.images) * (255 / 16)
        held_out = torch.arange(len(pixels)) % 5 == 4
        chosen = {"all": held_out | True, "train": ~held_out, "test": held_out}[self.split]
        return ImageDataset(
            name="digits" if self.split == "all" else f"digits/{self.split}",
            images=pixels.round().to(torch.uint8).unsqueeze(1)[chosen],
            labels=torch.from_numpy(digits.target).to(torch.int64)[chosen],
            num_classes=10,
            class_names=tuple(map(str, digits.target_names)),
        )
