"""Image files in folders and EDM's zip files, decoded on demand. Every problem is reported with the file's name."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from reprlib import repr as brief
from typing import Any, Literal, final

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fewstep.data.dataset import ImageDataset, explained
from fewstep.data.malformed import Malformed
from fewstep.system.bounds import parse_json
from fewstep.system.errors import DataError

__all__ = ["LazyImages", "check_endings", "is_image", "spread"]

SAMPLED = (
    1_024  # images whose content is read for a fingerprint: all of a small set, without a full pass over a large one
)
# Limits against files that unpack to far more than their size. Generous: they only keep one file from taking all memory.
MAX_BYTES = 2**28  # of one image file or dataset.json
_MAX_PIXELS = 2**26  # of one image: 8192 x 8192
_MAX_CLASSES = 100_000  # class tables are as long as the highest label, which a file may set to any number

# Sets smaller than this after decoding are held as one tensor: training then needs no decoding, and a damaged image is
# found at the start. Larger sets are decoded batch by batch.
_EAGER_BYTES = 2**30

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_OTHER_PICTURES = (
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
    ".jfif",
    ".jp2",
    ".jxl",
    ".ppm",
    ".pgm",
    ".tga",
)
_FORMATS = ("PNG", "JPEG", "WEBP")

Frame = Callable[[Image.Image], Image.Image]
Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture with its original size and crop.

    Attributes:
        pixels: uint8 [C, H, W].
        frame: height and width that it had, and rows and columns that were cut off at its top and left after it was resized.
    """

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    frame: tuple[int, int, int, int]


@final
class LazyImages:
    """Encoded images, decoded on indexing by a few threads (Pillow releases the interpreter lock).

    `images[indices]` takes what a tensor takes along its first axis (int64 [n], a mask, a slice, an int) and
    gives uint8 [n, C, H, W]; `images.shape` is [N, C, H, W]. The first image sets the shape of all. A forked
    process loads its own: the open file of a zip cannot be shared.

    Raises:
        DataError: on construction for the first image if that sets the shape, else when indexed: an image is unreadable,
            truncated, too large or of another shape.
        IndexError: an index out of range.
    """

    def __init__(
        self,
        place: str,
        names: Sequence[str],
        read: Callable[[str], bytes],
        channels: Literal[1, 3] | None,
        size: Size | None,
        frame: Frame | None = None,
        background: str | None = None,
    ) -> None:
        """`read(name)` gives a file's bytes and is called from several threads; `place` is for error
        messages; `channels` None: take what is stored, which must be 8-bit grey or RGB; `size`: height and width to crop
        and resize to; `frame` instead of it: what brings each picture to its form; `background`: colour behind transparent pixels, which are refused without."""
        self._background = background
        self.place, self.names, self._read = place, names, read
        self._channels, self._size, self._frame = channels, size, frame
        self._positions = torch.arange(len(names))
        # where the form of all is known no image is needed to tell it, which may be damaged
        known = (channels, *size) if channels and size else self._decode(0, ()).pixels.shape
        self.shape = torch.Size((len(names), *known))

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self, strict: bool = True) -> str:
        """sha256 (hex) of all names and of the encoded content of up to `SAMPLED` images, evenly spread.

        Raises:
            DataError: one of them cannot be read; unless `strict`, its content counts as empty.
        """
        digest = hashlib.sha256(json.dumps(list(self.names)).encode())
        for index in spread(len(self.names)):
            content = b""
            try:
                with explained(f"{self.place}/{self.names[index]} cannot be read", "replace or remove this file"):
                    content = self._read(self.names[index])
            except DataError:
                if strict:
                    raise
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def attempt(self, indices: Sequence[int], sizes: Sequence[Size]) -> list[Picture | Malformed]:
        """Decode images, each for the one of `sizes` whose shape is nearest to its own; what cannot be decoded gives its problem."""

        def decoded(index: int) -> Picture | Malformed:
            try:
                return self._decode(index, sizes)
            except DataError as error:
                return Malformed(str(error))

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(decoded, indices))

    def __getitem__(self, indices: Tensor | slice | int) -> Tensor:
        chosen = self._positions[indices]  # torch's own indexing rules, IndexError included
        flat = chosen.reshape(-1).tolist()
        pixels = np.empty((len(flat), *self.shape[1:]), dtype=np.uint8)

        def fill(start: int) -> None:
            for row in range(start, min(start + 16, len(flat))):
                pixels[row] = self._decode_checked(flat[row])

        # one pool per batch: starting threads costs far less than decoding, and nothing must be closed
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(fill, range(0, len(flat), 16)):
                pass  # going through the results raises the first error, and cancels what has not begun
        return torch.from_numpy(pixels).reshape(*chosen.shape, *self.shape[1:])

    def _decode_checked(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        pixels = self._decode(index, (self._size,) if self._size else ()).pixels
        if pixels.shape != self.shape[1:]:
            raise DataError(
                f"{self.place}/{self.names[index]} is {_dimensions(pixels.shape)}, but the first image "
                f"({self.names[0]}) is {_dimensions(self.shape[1:])}: all must be alike; make them so, "
                "or load them as a folder (kind: folder) with `size`, which crops and resizes each"
            )
        return pixels

    def _decode(self, index: int, sizes: Sequence[Size]) -> Picture:
        where = f"{self.place}/{self.names[index]}"
        with explained(f"{where} cannot be read as PNG, JPEG or WEBP", "replace or remove this file"):
            blob = self._read(self.names[index])
            with opened(blob) as image:
                width, height = image.size  # from the header: no pixel is decoded yet
                if width * height > _MAX_PIXELS:
                    raise DataError(f"{where} has {width}x{height} pixels, more than {_MAX_PIXELS}: shrink it")
                upright = ImageOps.exif_transpose(image)  # photographs keep their rotation in a tag
                return _picture(upright, where, self._channels, sizes, self._frame, self._background)


def opened(blob: bytes) -> Image.Image:
    """Open a picture of the formats that are read; its pixels are not decoded yet."""
    try:
        return Image.open(io.BytesIO(blob), formats=_FORMATS)
    except UnidentifiedImageError:  # its message is the address of the bytes in memory
        raise UnidentifiedImageError("none of these formats is in it") from None


def _dimensions(shape: Sequence[int]) -> str:
    return f"{shape[2]}x{shape[1]} {'grey' if shape[0] == 1 else 'RGB'}"


def _picture(
    image: Image.Image,
    where: str,
    channels: Literal[1, 3] | None,
    sizes: Sequence[Size],
    frame: Frame | None,
    background: str | None = None,
) -> Picture:
    """Convert a decoded image to uint8 [C, H, W]; refuse ambiguous conversions."""
    whole, cut = (image.height, image.width), (0, 0)
    if channels is None and image.mode not in ("L", "RGB"):
        raise DataError(
            f"{where} has pixel format {image.mode}, but a zip dataset holds 8-bit grey (L) or RGB images: "
            "convert it, or unpack the zip and load it as a folder (kind: folder)"
        )
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{where} has pixel format {image.mode} (more than 8 bits): save it with 8 bits per channel")
    if image.has_transparency_data and background is not None:
        opaque = Image.new("RGBA", image.size, background)
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque.convert("RGB")
    elif image.has_transparency_data:
        lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
        if isinstance(lowest, tuple) or lowest < 255:
            raise DataError(f"{where} has transparent pixels. Try: data.background white, or save it opaque")
    if channels is not None:
        image = image.convert("L" if channels == 1 else "RGB")
    if sizes:
        height, width = min(sizes, key=lambda size: abs(math.log(size[0] / size[1] * image.width / image.height)))
        scale = min(image.width / width, image.height / height)
        across, down = round(width * scale), round(height * scale)  # whole pixels, as EDM's dataset_tool.py crops
        left, top = (image.width - across) // 2, (image.height - down) // 2
        image = image.crop((left, top, left + across, top + down))
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        cut = (round(top / scale), round(left / scale))
    if frame is not None:
        image = frame(image)
    pixels = np.asarray(image)
    return Picture(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), (*whole, *cut))


def dataset_of(
    name: str, images: LazyImages, labels: Tensor | None, class_names: tuple[str, ...], source: list[Any]
) -> ImageDataset:
    return ImageDataset(
        name=name,
        images=images[:] if images.shape.numel() <= _EAGER_BYTES else images,
        labels=labels,
        num_classes=len(class_names),
        class_names=class_names,
        source=hashlib.sha256(json.dumps(source).encode()).hexdigest(),
    )


def spread(count: int) -> list[int]:
    """Numbers of up to `SAMPLED` of so many images, evenly spread, whose content stands for that of all."""
    return sorted({index * count // SAMPLED for index in range(SAMPLED)}) if count > SAMPLED else list(range(count))


def check_endings(place: Path, files: Iterable[str]) -> None:
    """Refuse a mix of supported and unsupported image formats, because the latter would be omitted.

    Raises:
        DataError: there are unsupported ones.
    """
    other = sorted(name for name in files if name.lower().endswith(_OTHER_PICTURES))
    if other:
        raise DataError(
            f"{place} must hold {', '.join(_SUFFIXES)} pictures, got {len(other)} of another kind as well, first {other[0]}: they "
            "would be left out. Try: convert them, or move them away"
        )


def is_image(name: str) -> bool:
    """Return whether a file is a picture, by its extension."""
    return name.lower().endswith(_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Return whether a file is hidden or a desktop's own: .thumbnails/, ._a.png, __MACOSX/."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def no_images(place: Path, files: Sequence[str]) -> DataError:
    endings = Counter(PurePosixPath(file).suffix or "no ending" for file in files).most_common(3)
    found = ", ".join(f"{count} x {ending}" for ending, count in endings) or "nothing"
    return DataError(f"{place} holds no image ({', '.join(_SUFFIXES)}), but {found}: check the path, or convert them")


def labels_from_json(blob: bytes, where: str, names: Sequence[str]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels of `names`, and names of the classes, from EDM's {"labels": [[name, class], ...]}.

    {"labels": null} means unlabelled. There are as many classes as the highest label asks for; the file does
    not name them, so they are called "0", "1", ...
    """
    with explained(f"{where} is not valid JSON", 'write it as {"labels": [["00000/img00000000.png", 6], ...]}'):
        content = parse_json(blob)
    if not isinstance(content, dict) or "labels" not in content:
        raise DataError(f'{where} has no entry "labels": add it as [["name.png", class], ...], or null if unlabelled')
    entries = content["labels"]
    if entries is None:
        return None, ()
    if not isinstance(entries, list):
        raise DataError(f'{where}: "labels" is not a list: write [["name.png", class], ...], or null if unlabelled')
    label_of: dict[str, int] = {}
    for number, entry in enumerate(entries):
        match entry:
            case [str(name), int(label)] if not isinstance(label, bool):
                name = name.replace("\\", "/")  # as EDM does, for files made on Windows
            case _:
                raise DataError(
                    f'{where}: entry {number} is {brief(entry)}: write ["name.png", class], class an integer'
                )
        if name in label_of:
            raise DataError(f"{where} lists {name} twice. Try: keep one of the entries")
        if not 0 <= label < _MAX_CLASSES:
            raise DataError(f"{where} gives {name} the label {brief(label)}: classes go from 0 to {_MAX_CLASSES - 1}")
        label_of[name] = label
    unlabelled = [name for name in names if name not in label_of]
    if unlabelled:
        raise DataError(
            f"{where} has no label for {len(unlabelled)} of {len(names)} images, first {unlabelled[0]}: "
            'add them, or write {"labels": null} to use none'
        )
    if len(label_of) > len(names):
        missing = sorted(label_of.keys() - set(names))
        raise DataError(
            f"{where} labels {len(missing)} images that are not there, first {missing[0]}: restore or unlist them"
        )
    labels = torch.tensor([label_of[name] for name in names], dtype=torch.int64)
    return labels, tuple(str(k) for k in range(int(labels.max()) + 1))


def too_large(where: str, size: int) -> DataError:
    return DataError(f"{where} has {size} bytes, more than {MAX_BYTES}: no image or label file needs that; remove it")
