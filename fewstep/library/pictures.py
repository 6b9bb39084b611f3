"""Pictures of a model: a tensor, PIL images, a grid in a notebook, files."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from PIL import Image
from torch import Tensor

from fewstep.students.sample import check_place, write_pictures
from fewstep.system.errors import SettingsError
from fewstep.system.pictures import grid

__all__ = ["Pictures"]

COLUMNS = 8  # of a grid, unless another number is asked for
LEAST_SIDE = 64  # pixels of a picture in a notebook's grid: smaller ones are enlarged


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures in the order of their seeds. An index gives a PIL image, a slice gives `Pictures`; iteration gives PIL images.

    Attributes:
        tensor: uint8 [N, C, H, W] on the CPU; C is 1 or 3.
        seeds: seed of each picture; its number for pictures of given noise.
        labels: class or prompt of each picture [N], as a number; None for a model without classes.
        names: name of each picture's class, or its prompt; empty without classes.
    """

    tensor: Tensor
    seeds: tuple[int, ...]
    labels: Tensor | None = None
    names: tuple[str, ...] = ()

    @property
    def images(self) -> list[Image.Image]:
        """The pictures as PIL images."""
        return list(self)

    def __len__(self) -> int:
        return len(self.tensor)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Pictures: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Pictures:
        if isinstance(index, slice):
            labels = None if self.labels is None else self.labels[index]
            return replace(
                self, tensor=self.tensor[index], seeds=self.seeds[index], labels=labels, names=self.names[index]
            )
        if not -len(self) <= index < len(self):
            raise IndexError(f"the index of a picture must be below {len(self)}, got {index}")
        return grid(self.tensor[index][None], columns=1, gap=0)

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        if not len(self):
            return "Pictures(none)"
        count, _, height, width = self.tensor.shape
        of = f", of {', '.join(dict.fromkeys(self.names))}"[:80] if self.names else ""
        return f"Pictures({count} of {width}x{height} pixels{of})"

    def grid(self, columns: int | None = None, scale: int = 1) -> Image.Image:
        """Arrange the pictures in rows on white.

        Args:
            columns: number of columns; None: 8, or fewer for fewer pictures.
            scale: enlargement of each pixel.

        Raises:
            SettingsError: no pictures, or a number below 1.
        """
        columns = min(COLUMNS, len(self)) if columns is None else columns
        if not len(self):
            raise SettingsError("a grid must hold at least one picture, got none. Try: seeds=range(16)")
        for name, value in (("columns", columns), ("scale", scale)):
            if value < 1:
                raise SettingsError(f"`{name}` must be at least 1, got {value}. Try: 8")
        return grid(self.tensor, columns, scale=scale)

    def _repr_png_(self) -> bytes | None:
        """The grid, for notebooks."""
        if not len(self):
            return None
        drawn = io.BytesIO()
        self.grid(scale=max(1, math.ceil(LEAST_SIDE / self.tensor.shape[-1]))).save(drawn, "PNG")
        return drawn.getvalue()

    def save(self, path: Path | str, columns: int = COLUMNS, scale: int = 2) -> Path:
        """Write a grid (.png), arrays (.npz: images [N, H, W, C], seeds, labels) or a folder of `<seed>.png`; returns the path.

        Args:
            path: the file or folder.
            columns: columns of the grid.
            scale: enlargement of each pixel in the grid.

        Raises:
            SettingsError: another ending, or a folder in which files would overwrite each other.
            FileError: the folder holds other files.
        """
        out = Path(path).expanduser()
        check_place(out, self.seeds, tuple(self.tensor.shape[1:]), columns, scale, "path")
        write_pictures([self.tensor], self.seeds, self.labels, out, columns, scale)
        return out
