"""Images and labels to train on and to compare with, loaded and checked; knows nothing of diffusion.

A spec (`FashionMNIST`, `Digits`, `ImageFolder`, `ZipDataset`; together `DataSpec`) is what a recipe's `data:`
block holds; `spec.load()` gives an `ImageDataset`. Everything wrong with the data raises `DataError`.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import os
import struct
import threading
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from reprlib import repr as brief
from typing import Annotated, Any, Literal, NoReturn, final

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

__all__ = [
    "AnyData",
    "DataError",
    "DataSpec",
    "Digits",
    "FashionMNIST",
    "ImageDataset",
    "ImageFolder",
    "LazyImages",
    "ZipDataset",
    "cache_folder",
    "shuffled_indices",
    "to_uint8",
    "to_unit",
]

# Limits against files that unpack to far more than they weigh. Generous: they only have to keep one file from
# taking the machine's memory.
_MAX_BYTES = 2**28  # of one image file or dataset.json
_MAX_PIXELS = 2**26  # of one image: 8192 x 8192
_MAX_CLASSES = 100_000  # class tables are as long as the highest label, which a file may set to anything

# Sets that take less than this once decoded are held as one tensor: training on them then costs no decoding,
# and a broken image is found at the start. Larger ones are decoded batch by batch.
_EAGER_BYTES = 2**30

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "JPEG", "WEBP")

# What the standard library and Pillow raise on damaged files (SyntaxError: broken PNG).
_BAD_FILE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    NotImplementedError,
    RecursionError,
    zlib.error,
    zipfile.BadZipFile,
    Image.DecompressionBombError,
)


class DataError(ValueError):
    """Data that cannot be used; the message names the value, the place and the way out."""


@contextmanager
def _explained(problem: str, way_out: str) -> Iterator[None]:
    """What a library raises on a damaged or missing file becomes `DataError("problem (cause): way out")`."""
    try:
        yield
    except DataError:  # already says what is wrong
        raise
    except _BAD_FILE as error:
        raise DataError(f"{problem} ({type(error).__name__}: {error}): {way_out}") from error


# ----------------------------------------------------------------------------------------------- pixel values


def to_unit(images: Tensor) -> Tensor:
    """Pixel values 0..255 (uint8, any shape) as float32 in [-1, 1]: x / 127.5 - 1."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] (float, any shape) as uint8: x * 127.5 + 128, clipped to 0..255, fraction dropped.

    This is the quantisation of EDM's evaluation (Karras et al. 2022, github.com/NVlabs/edm, generate.py), so
    FIDs compare; it inverts `to_unit` exactly. Computed in float32, because bfloat16 cannot tell neighbouring
    pixel values apart. NaN has no pixel value: the caller makes sure that there is none.
    """
    return (images.to(torch.float32) * 127.5 + 128).clip(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------------------ order


@lru_cache(maxsize=4)  # two streams (say data and evaluation), each across the border of two epochs
def _permutation(n: int, epoch: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(n))


def shuffled_indices(n: int, start: int, count: int, seed: int) -> Tensor:
    """Entries `start .. start + count - 1` of an endless shuffled sequence of 0..n-1, int64 [count].

    The sequence is one permutation after another; the one of an epoch (position // n) is drawn from (seed,
    epoch) alone. It has no state, so a resumed run needs to know only how many images it has seen.

    Raises:
        DataError: if n < 1, or start, count or seed is negative.
    """
    if n < 1 or start < 0 or count < 0 or seed < 0:
        raise DataError(f"cannot shuffle n={n}, start={start}, count={count}, seed={seed}: n >= 1, the others >= 0")
    pieces = [torch.empty(0, dtype=torch.int64)]
    position, stop = start, start + count
    while position < stop:
        epoch, first = divmod(position, n)
        last = min(n, first + stop - position)
        pieces.append(_permutation(n, epoch, seed)[first:last])
        position += last - first
    return torch.cat(pieces)  # a copy: the cached permutation stays as it is


# ---------------------------------------------------------------------------------------------------- dataset


@final
class LazyImages:
    """Encoded images that are decoded when indexed, by a few threads (Pillow releases the interpreter lock).

    `images[indices]` takes what a tensor takes along its first axis (int64 [n], a mask, a slice, an int) and
    gives uint8 [n, C, H, W]; `images.shape` is [N, C, H, W]. The first image sets the shape of all. A forked
    process loads its own: the open file of a zip cannot be shared.

    Raises:
        DataError: on construction for the first image, else when indexed: an image is unreadable, truncated,
            too large or of another shape.
        IndexError: an index out of range.
    """

    def __init__(
        self,
        place: str,
        names: Sequence[str],
        read: Callable[[str], bytes],
        channels: Literal[1, 3] | None,
        size: int | None,
    ) -> None:
        """`read(name)` gives a file's bytes and is called from several threads; `place` is for error
        messages; `channels` None: take what is stored, which must be 8-bit grey or RGB."""
        self._place, self._names, self._read = place, names, read
        self._channels, self._size = channels, size
        self._positions = torch.arange(len(names))
        self.shape = torch.Size((len(names), *self._decode(0).shape))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, indices: Tensor | slice | int) -> Tensor:
        chosen = self._positions[indices]  # torch's own indexing rules, IndexError included
        flat = chosen.reshape(-1).tolist()
        pixels = np.empty((len(flat), *self.shape[1:]), dtype=np.uint8)

        def fill(start: int) -> None:
            for row in range(start, min(start + 16, len(flat))):
                pixels[row] = self._decode_checked(flat[row])

        # One pool a batch: starting threads costs far less than decoding, and nothing is left to close.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(fill, range(0, len(flat), 16)):
                pass  # going through the results raises the first error, and cancels what has not begun
        return torch.from_numpy(pixels).reshape(*chosen.shape, *self.shape[1:])

    def _decode_checked(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        pixels = self._decode(index)
        if pixels.shape != self.shape[1:]:
            raise DataError(
                f"{self._place}/{self._names[index]} is {_dimensions(pixels.shape)}, but the first image "
                f"({self._names[0]}) is {_dimensions(self.shape[1:])}: all must be alike; make them so, "
                "or load them as a folder (kind: folder) with `size`, which crops and resizes each"
            )
        return pixels

    def _decode(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        where = f"{self._place}/{self._names[index]}"
        with _explained(f"{where} cannot be read as PNG, JPEG or WEBP", "replace or remove this file"):
            blob = self._read(self._names[index])
            with Image.open(io.BytesIO(blob), formats=_FORMATS) as image:
                width, height = image.size  # from the header: no pixel is decoded yet
                if width * height > _MAX_PIXELS:
                    raise DataError(f"{where} has {width}x{height} pixels, more than {_MAX_PIXELS}: shrink it")
                upright = ImageOps.exif_transpose(image)  # photographs keep their rotation in a tag
                return _pixels(upright, where, self._channels, self._size)


def _dimensions(shape: Sequence[int]) -> str:
    return f"{shape[2]}x{shape[1]} {'grey' if shape[0] == 1 else 'RGB'}"


def _pixels(
    image: Image.Image, where: str, channels: Literal[1, 3] | None, size: int | None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A decoded image as uint8 [C, H, W]; refuses what could only be converted by a guess."""
    if channels is None and image.mode not in ("L", "RGB"):
        raise DataError(
            f"{where} has pixel format {image.mode}, but a zip dataset holds 8-bit grey (L) or RGB images: "
            "convert it, or unpack the zip and load it as a folder (kind: folder)"
        )
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{where} has pixel format {image.mode} (more than 8 bits): save it with 8 bits per channel")
    if image.has_transparency_data:
        lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
        if isinstance(lowest, tuple) or lowest < 255:
            raise DataError(f"{where} has transparent pixels: draw it on the background you want and save it opaque")
    if channels is not None:
        image = image.convert("L" if channels == 1 else "RGB")
    if size is not None:
        side = min(image.size)  # whole pixels, as EDM's dataset_tool.py crops
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@final
@dataclass(frozen=True, eq=False)  # eq: tensors have no truth value, so a dataset equals only itself
class ImageDataset:
    """N images of one shape, with or without class labels.

    Raises:
        DataError: on construction, if images, labels and classes do not fit together.
    """

    name: str
    """What it is, for people: "fashion-mnist/train"."""
    images: Tensor | LazyImages = field(repr=False)
    """uint8 [N, C, H, W], on the CPU."""
    labels: Tensor | None = field(default=None, repr=False)
    """int64 [N] in 0..num_classes-1; None: unlabelled."""
    num_classes: int = 0
    """0 if unlabelled."""
    class_names: tuple[str, ...] = ()
    """One name for each class."""
    source: str = field(default="", repr=False)
    """Stands for the pixels in the fingerprint, where hashing those would be dear; empty: they are hashed."""

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if isinstance(self.images, Tensor) and (self.images.dtype != torch.uint8 or len(shape) != 4):
            raise DataError(f"{self.name}: images are {self.images.dtype} {list(shape)}: give uint8 [N, C, H, W]")
        if 0 in shape:
            raise DataError(f"{self.name}: images of shape {list(shape)} hold no pixel: give at least one image")
        if len(self.class_names) != self.num_classes:
            raise DataError(f"{self.name}: {len(self.class_names)} names for {self.num_classes} classes: give one each")
        if self.labels is None:
            if self.num_classes:
                raise DataError(f"{self.name}: {self.num_classes} classes but no labels: give labels or 0 classes")
            return
        if self.labels.dtype != torch.int64 or self.labels.shape != shape[:1]:
            raise DataError(
                f"{self.name}: labels are {self.labels.dtype} {list(self.labels.shape)}: give int64 [{shape[0]}]"
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
        """Images and labels at `indices` (int64 [n]): float32 [n, C, H, W] in [-1, 1], int64 [n] or None.

        `flip` (bool [n]) mirrors the chosen images left to right. It is an argument because the draw belongs
        to whoever owns the random state.

        Raises:
            DataError: an image of a lazily decoded set is unreadable.
            IndexError: an index out of range.
        """
        images = to_unit(self.images[indices])
        if flip is not None:
            images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        return images, None if self.labels is None else self.labels[indices]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of what the data are, wherever they lie; evaluation protocols carry it.

        It covers the shape [N, C, H, W], the labels, the number of classes and the content. The content is
        the pixels for data held by packages (Fashion-MNIST, digits), the sorted file names and sizes for a
        folder, and names, sizes and CRC-32 for a zip. So a folder costs no reading, but a file replaced by
        one of the same name and size goes unnoticed. Names of the dataset and its classes, and the path, have
        no influence.
        """
        digest = hashlib.sha256(b"fewstep data 1\n")  # counted up when the rule changes
        labelled = self.labels is not None
        digest.update(json.dumps([list(self.images.shape), self.num_classes, labelled, self.source]).encode())
        if self.labels is not None:
            digest.update(self.labels.cpu().numpy().astype("<i8").tobytes())
        if not self.source:
            for start in range(0, len(self), 4096):
                digest.update(self.images[start : start + 4096].cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _dataset(
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


# ---------------------------------------------------------------------------- names and labels of image files


def _is_image(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def _is_hidden(name: str) -> bool:
    """Leftovers of desktops: .thumbnails/, ._a.png, __MACOSX/."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _no_images(place: Path, files: Sequence[str]) -> DataError:
    endings = Counter(PurePosixPath(file).suffix or "no ending" for file in files).most_common(3)
    found = ", ".join(f"{count} x {ending}" for ending, count in endings) or "nothing"
    return DataError(f"{place} holds no image ({', '.join(_SUFFIXES)}), but {found}: check the path, or convert them")


def _labels_from_json(blob: bytes, where: str, names: Sequence[str]) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels of `names`, and names of the classes, from EDM's {"labels": [[name, class], ...]}.

    {"labels": null} means unlabelled. There are as many classes as the highest label asks for; the file does
    not name them, so they are called "0", "1", ...
    """
    with _explained(f"{where} is not valid JSON", 'write it as {"labels": [["00000/img00000000.png", 6], ...]}'):
        content = json.loads(blob)
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
            raise DataError(f"{where} lists {name} twice: keep one of the entries")
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


def _too_large(where: str, size: int) -> DataError:
    return DataError(f"{where} has {size} bytes, more than {_MAX_BYTES}: no image or label file needs that; remove it")


# ------------------------------------------------------------------------------------------------------ specs


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


# File -> its IDX header's sizes, and the sha256 of the *unpacked* file. Debian packs the files anew without
# gzip's name and time fields, so its .gz differ from the originals in the header only: putting those fields
# back gives the md5 sums that torchvision checks, for all four files.
_FASHION_MNIST: dict[str, tuple[tuple[int, ...], str]] = {
    "train-images-idx3-ubyte.gz": (
        (60000, 28, 28),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    "train-labels-idx1-ubyte.gz": (
        (60000,),
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "t10k-images-idx3-ubyte.gz": (
        (10000, 28, 28),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        (10000,),
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
# The only mirror that torchvision knows. It has no https; the checksums protect.
_FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


def cache_folder() -> Path:
    return Path(os.environ.get("FEWSTEP_CACHE") or "~/.cache/fewstep").expanduser()


@final
class FashionMNIST(_Spec):
    """Fashion-MNIST: 60,000 (test: 10,000) grey 28x28 pictures of clothes in ten classes (Xiao, Rasul and
    Vollgraf 2017, arXiv:1708.07747)."""

    kind: Literal["fashion-mnist"] = "fashion-mnist"
    split: Literal["train", "test"] = "train"
    """Which part to load."""
    root: Path | None = None
    """Folder with the four .gz files. It is looked into first, then the Debian package dataset-fashion-mnist,
    then $FEWSTEP_CACHE/fashion-mnist (default ~/.cache/fewstep/fashion-mnist). A missing file is downloaded
    into `root`, or without one into the cache."""

    def load(self) -> ImageDataset:
        """Images uint8 [60000 or 10000, 1, 28, 28] and labels 0..9.

        Raises:
            DataError: a file is nowhere and cannot be downloaded, or is not the published one.
        """
        prefix = "train" if self.split == "train" else "t10k"
        return ImageDataset(
            name=f"fashion-mnist/{self.split}",
            images=self._read(f"{prefix}-images-idx3-ubyte.gz").unsqueeze(1),
            labels=self._read(f"{prefix}-labels-idx1-ubyte.gz").to(torch.int64),
            num_classes=len(_FASHION_MNIST_CLASSES),
            class_names=_FASHION_MNIST_CLASSES,
        )

    def _read(self, file: str) -> Tensor:
        own = [] if self.root is None else [self.root.expanduser()]
        folders = [*own, _DEBIAN_FOLDER, cache_folder() / "fashion-mnist"]
        target = own[0] if own else folders[-1]
        url = _FASHION_MNIST_URL + file
        way_out = f"run `apt-get install dataset-fashion-mnist`, or put {file} from {url} into {target}"

        for path in (folder / file for folder in folders):
            if path.is_file():
                with _explained(f"{path} cannot be read", f"remove it, then {way_out}"):
                    return _unpack_idx(path.read_bytes(), file, str(path), f"remove it, then {way_out}")

        nowhere = f"{file} of Fashion-MNIST is not in {', '.join(map(str, folders))}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                blob = response.read(2**26)  # the largest has 26 MB
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"{nowhere}, and {url} cannot be downloaded ({error}): {way_out}") from error
        values = _unpack_idx(blob, file, url, way_out)
        with _explained(f"{nowhere}, and the download cannot be stored in {target}", way_out):
            target.mkdir(parents=True, exist_ok=True)
            part = target / f"{file}.{os.getpid()}.part"
            try:
                part.write_bytes(blob)
                part.replace(target / file)  # at once: other processes see the whole file or none
            finally:
                part.unlink(missing_ok=True)
        return values


def _unpack_idx(blob: bytes, file: str, where: str, way_out: str) -> Tensor:
    """Values (uint8) of one of Fashion-MNIST's files: IDX (yann.lecun.com/exdb/mnist) packed by gzip."""
    sizes, sha256 = _FASHION_MNIST[file]
    # Two zero bytes, 8 for "unsigned byte", the number of axes, then their sizes as big-endian uint32.
    header = struct.pack(f">HBB{len(sizes)}I", 0, 8, len(sizes), *sizes)
    length = len(header) + int(np.prod(sizes))
    with _explained(f"{where} is damaged", way_out), gzip.open(io.BytesIO(blob)) as packed:
        content = packed.read(length + 1)  # never more, whatever it would unpack to
    if content[: len(header)] != header:
        raise DataError(
            f"{where} starts with {content[: len(header)].hex()}, not {header.hex()} (the magic number "
            f"and sizes {list(sizes)}), so it is not {file}: {way_out}"
        )
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"{where} unpacks to sha256 {found}, but the published file to {sha256}: {way_out}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=len(header)).reshape(sizes)


@final
class Digits(_Spec):
    """The 1,797 handwritten digits, grey 8x8, that scikit-learn carries (Alpaydin and Kaynak 1998,
    archive.ics.uci.edu/dataset/80); needs no download."""

    kind: Literal["digits"] = "digits"

    def load(self) -> ImageDataset:
        """Images uint8 [1797, 1, 8, 8], the values 0..16 stretched to 0..255, and labels 0..9.

        Raises:
            DataError: scikit-learn is not installed.
        """
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                "the digits come with scikit-learn, which is missing: pip install 'fewstep[digits]'"
            ) from error
        digits = load_digits()
        pixels = torch.from_numpy(digits.images) * (255 / 16)
        return ImageDataset(
            name="digits",
            images=pixels.round().to(torch.uint8).unsqueeze(1),
            labels=torch.from_numpy(digits.target).to(torch.int64),
            num_classes=10,
            class_names=tuple(map(str, digits.target_names)),
        )


@final
class ImageFolder(_Spec):
    """PNG, JPEG and WEBP files anywhere below a folder; other and hidden files are ignored. Of an animation
    the first frame counts; photographs are turned upright by their EXIF tag.

    Labels: if the folder holds a dataset.json in EDM's layout, those. Otherwise, if the images lie in
    sub-folders, the sub-folders directly below the path, sorted by name, are the classes. Otherwise there are
    none.
    """

    kind: Literal["folder"] = "folder"
    path: Path
    """The folder."""
    size: Annotated[int, Field(ge=1, le=8192)] | None = None
    """Crop each image to its central square and resize that (Lanczos) to this many pixels a side; null: take
    the images as they are, all of one size."""
    channels: Literal[1, 3] = 3
    """3: colour, grey images get three equal channels. 1: grey, colours become their luminance."""

    def load(self) -> ImageDataset:
        """Images uint8 [N, channels, H, W], in the order of their sorted names; `LazyImages` above 1 GiB.

        Raises:
            DataError: no such folder, no image in it, an image that cannot be used (large sets: when it is
                first decoded), or labels that do not fit.
        """
        root = self.path.expanduser()
        if not root.is_dir():
            found = "is a file" if root.exists() else "does not exist"
            raise DataError(f"data.path {root} {found}: give a folder of images (for a zip file set kind: zip)")
        with _explained(f"{root} cannot be listed", "make all of it readable"):
            files = sorted(_files_below(root))
            names = [name for name in files if _is_image(name)]
            sizes = [(root / name).stat().st_size for name in names]
        if not names:
            raise _no_images(root, files)
        for name, size in zip(names, sizes, strict=True):
            if size > _MAX_BYTES:
                raise _too_large(f"{root}/{name}", size)

        table = root / "dataset.json"
        if table.exists():
            with _explained(f"{table} cannot be read", "make it a readable file, or remove it"):
                if table.stat().st_size > _MAX_BYTES:
                    raise _too_large(str(table), table.stat().st_size)
                blob = table.read_bytes()
            labels, classes = _labels_from_json(blob, str(table), names)
        else:
            labels, classes = _labels_from_folders(root, names)

        def read(name: str) -> bytes:
            return (root / name).read_bytes()

        images = LazyImages(str(root), names, read, self.channels, self.size)
        return _dataset(root.resolve().name, images, labels, classes, [names, sizes])


def _files_below(root: Path) -> Iterator[str]:
    """Names of all files that are not hidden, relative to `root`, with "/" on every system."""
    seen: dict[str, str] = {}

    def fail(error: OSError) -> NoReturn:
        raise error  # os.walk would skip a folder that it may not read

    # Links are followed, because subsets of classes are often made of them.
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in seen:
            raise DataError(
                f"{folder} and {seen[real]} are one folder, by a link, and its images would count twice: remove it"
            )
        seen[real] = folder
        subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
        prefix = Path(folder).relative_to(root)
        yield from ((prefix / file).as_posix() for file in files if not _is_hidden(file))


def _labels_from_folders(root: Path, names: Sequence[str]) -> tuple[Tensor | None, tuple[str, ...]]:
    parents = [name.split("/")[0] if "/" in name else None for name in names]
    classes = sorted({parent for parent in parents if parent is not None})
    if not classes:
        return None, ()
    if None in parents:
        raise DataError(
            f"{root} has images both in sub-folders and beside them, first "
            f"{names[parents.index(None)]}: move those into a sub-folder, or label all in a dataset.json"
        )
    number = {name: k for k, name in enumerate(classes)}
    return torch.tensor([number[parent] for parent in parents if parent is not None]), tuple(classes)


@final
class ZipDataset(_Spec):
    """A zip file as EDM's dataset_tool.py writes them: 8-bit grey or RGB images of one size, and at its top a
    dataset.json with the labels (none, or {"labels": null}: unlabelled). Nothing is unpacked to disk."""

    kind: Literal["zip"] = "zip"
    path: Path
    """The zip file."""

    def load(self) -> ImageDataset:
        """Images uint8 [N, 1 or 3, H, W], in the order of their sorted names; `LazyImages` above 1 GiB.

        Raises:
            DataError: no such file, not a zip, no image in it, members that are encrypted, twice there or too
                large, an image that cannot be used (large sets: when it is first decoded), or labels that do
                not fit.
        """
        path = self.path.expanduser()
        if not path.is_file():
            found = "is a folder" if path.exists() else "does not exist"
            raise DataError(f"data.path {path} {found}: give a zip file (for a folder of images set kind: folder)")
        with _explained(f"{path} cannot be read as a zip file", "make or fetch it again"):
            archive = zipfile.ZipFile(path)
        members = {member.filename: member for member in archive.infolist() if not _is_hidden(member.filename)}
        names = sorted(name for name in members if _is_image(name))
        if not names:
            raise _no_images(path, [name for name in members if not name.endswith("/")])
        copies = Counter(member.filename for member in archive.infolist())
        for name in (*names, "dataset.json"):
            if name in members:
                _check_member(f"{path}/{name}", members[name], copies[name])

        lock = threading.Lock()  # the decoding threads share one file, and zipfile promises nothing for that

        def read(name: str) -> bytes:
            # Bounded, because a member may claim to be smaller than what it unpacks to.
            with lock, archive.open(members[name]) as stream:
                return stream.read(_MAX_BYTES)

        labels, classes = self._labels(path, members, names, read)
        images = LazyImages(str(path), names, read, channels=None, size=None)
        source = [[name, members[name].file_size, members[name].CRC] for name in names]
        return _dataset(path.resolve().name, images, labels, classes, source)

    def _labels(
        self,
        path: Path,
        members: dict[str, zipfile.ZipInfo],
        names: Sequence[str],
        read: Callable[[str], bytes],
    ) -> tuple[Tensor | None, tuple[str, ...]]:
        if "dataset.json" in members:
            with _explained(f"{path}/dataset.json cannot be read", "make or fetch the zip again"):
                blob = read("dataset.json")
            return _labels_from_json(blob, f"{path}/dataset.json", names)
        nested = [name for name in members if name.endswith("/dataset.json")]
        if nested:  # a zip of the folder instead of its content: its labels must not get lost silently
            raise DataError(
                f"{path} has {nested[0]}, but labels are read from dataset.json at its top: zip the content"
            )
        return None, ()


def _check_member(where: str, member: zipfile.ZipInfo, copies: int) -> None:
    if copies > 1:
        raise DataError(f"{where} is in the zip file {copies} times: make the file again")
    if member.flag_bits & 1:
        raise DataError(f"{where} is encrypted: make the zip file without a password")
    # The other methods unpack a whole block at once, however large, before any limit can stop them.
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{where} is packed by method {member.compress_type}: store or deflate it")
    if member.file_size > _MAX_BYTES:
        raise _too_large(where, member.file_size)


AnyData = FashionMNIST | Digits | ImageFolder | ZipDataset
DataSpec = Annotated[AnyData, Field(discriminator="kind")]
"""What a recipe's `data:` block may hold, told apart by `kind`."""
