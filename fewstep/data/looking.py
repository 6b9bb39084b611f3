"""A look at a folder of pictures: every file is decoded once, and what is odd is listed. Knows no run."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from fewstep.data.folders import list_files
from fewstep.data.image_files import MAX_BYTES, LazyImages, check_endings, is_image, no_images, opened
from fewstep.system.bounds import read_file, reading
from fewstep.system.errors import DataError, FileError

__all__ = ["Look", "look_at"]

SIZES = (16, 32, 64)  # of a network that is trained from scratch
ON_A_CPU = 32  # the largest that is trained without a GPU in hours


@dataclass(frozen=True)
class Look:
    """What a folder of pictures holds.

    Attributes:
        folder: the folder.
        count: pictures that can be used.
        classes: number of pictures by sub-folder; empty without sub-folders.
        loose: pictures beside the sub-folders, which have no class.
        sides: shorter side of each picture in pixels.
        shapes: number of different sizes.
        grey: number of grey pictures.
        transparent: files with transparent pixels.
        unusable: files that cannot be used, with the reason.
    """

    folder: Path
    count: int
    classes: dict[str, int]
    loose: tuple[str, ...]
    sides: tuple[int, ...]
    shapes: int
    grey: int
    transparent: tuple[str, ...]
    unusable: dict[str, str]

    @property
    def channels(self) -> int:
        """1 if all pictures are grey, else 3."""
        return 1 if self.grey == self.count else 3

    def size(self, gpu: bool) -> int:
        """Size to train at: the largest of `SIZES` that half of the pictures have and this machine trains in hours."""
        fitting = [side for side in SIZES if side <= statistics.median(self.sides) and (gpu or side <= ON_A_CPU)]
        return max(fitting, default=SIZES[0])


def _same(blob: bytes, _name: str) -> bytes:
    return blob


def _is_transparent(blob: bytes, file: Path) -> bool:
    with reading(file), opened(blob) as image:
        return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255


def look_at(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Look:
    """Decode every picture of a folder once.

    Args:
        folder: the folder.
        progress: called with the number of pictures seen, and of all.

    Raises:
        DataError: no folder, no picture in it, none that can be used, or pictures of a kind that is never read.
    """
    files = sorted(list_files(folder))
    names = [name for name in files if is_image(name)]
    if not names:
        raise no_images(folder, files)
    check_endings(folder, files)
    sides: list[int] = []
    shapes, classes = Counter[tuple[int, int]](), Counter[str]()
    loose, transparent, unusable, grey = list[str](), list[str](), dict[str, str](), 0
    for done, name in enumerate(names, 1):
        try:
            blob = read_file(folder / name, MAX_BYTES)
            pixels = LazyImages(str(folder), [name], partial(_same, blob), 3, None, None, "white")[0]
            seen_through = _is_transparent(blob, folder / name)
        except (DataError, FileError, OSError) as error:
            unusable[name] = str(error)
        else:
            sides.append(min(pixels.shape[1:]))
            shapes[(pixels.shape[1], pixels.shape[2])] += 1
            grey += bool((pixels[0] == pixels[1]).all() and (pixels[1] == pixels[2]).all())
            parts = PurePosixPath(name).parts
            if len(parts) > 1:
                classes[parts[0]] += 1
            else:
                loose.append(name)
            if seen_through:
                transparent.append(name)
        progress(done, len(names))
    if not sides:
        first = next(iter(unusable.values()))
        raise DataError(f"{folder} must hold pictures that can be read, got none among {len(names)}: {first}")
    return Look(
        folder, len(sides), dict(sorted(classes.items())), tuple(loose) if classes and not (folder / "dataset.json").exists() else (), tuple(sides), len(shapes), grey,
        tuple(transparent), unusable,
    )  # fmt: skip
