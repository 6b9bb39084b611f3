"""Data: pixel values, order, and every source with its errors, on files these tests write."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import struct
import sys
import threading
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from fewstep.data import (
    DataSpec,
    Digits,
    FashionMNIST,
    ImageDataset,
    ImageFolder,
    LazyImages,
    ZipDataset,
    fashion_mnist,
    image_files,
    shuffled_indices,
    to_uint8,
    to_unit,
)
from fewstep.system.errors import DataError
from tests.support.images import write, write_zip


def picture(seed: int = 0, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> Image.Image:
    """A picture of noise, (width, height)."""
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode=None)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(image: Image.Image) -> torch.Tensor:
    values = torch.from_numpy(np.array(image))
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def table(labels: object) -> bytes:
    return json.dumps({"labels": labels}).encode()


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_EAGER_BYTES", 0)


# ------------------------------------------------------------------------------------- pixel values and order


def test_pixel_values_survive_the_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(values)
    assert unit.dtype == torch.float32 and unit[0] == -1 and unit[255] == 1
    assert torch.equal(to_uint8(unit), values)


def test_quantisation_is_that_of_edm() -> None:
    x = torch.tensor([-2.0, -1.0, -0.5 / 127.5, 0.0, 0.49 / 127.5, 1.0, 2.0])
    assert to_uint8(x).tolist() == [0, 0, 127, 128, 128, 255, 255]


def test_quantisation_is_computed_in_float32() -> None:
    x = torch.linspace(-1, 1, 999).to(torch.bfloat16)
    assert torch.equal(to_uint8(x), to_uint8(x.float()))


@given(
    n=st.integers(1, 12),
    start=st.integers(0, 50),
    counts=st.lists(st.integers(0, 30), max_size=4),
    seed=st.integers(0, 2**63),
)
def test_shuffling_in_pieces_is_shuffling_at_once(n: int, start: int, counts: list[int], seed: int) -> None:
    whole = shuffled_indices(n, start, sum(counts), seed)
    pieces = [shuffled_indices(n, start + sum(counts[:k]), count, seed) for k, count in enumerate(counts)]
    assert whole.dtype == torch.int64 and whole.shape == (sum(counts),)
    assert torch.equal(whole, torch.cat([torch.empty(0, dtype=torch.int64), *pieces]))


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    epochs = shuffled_indices(50, 0, 150, seed=3).view(3, 50)
    assert torch.equal(epochs.sort(1).values, torch.arange(50).expand(3, 50))
    others = shuffled_indices(50, 0, 150, seed=4).view(3, 50)
    assert len({tuple(row) for row in torch.cat([epochs, others]).tolist()}) == 6


def test_changing_the_indices_leaves_the_sequence_alone() -> None:
    first = shuffled_indices(9, 0, 9, seed=0)
    kept = first.clone()
    first.zero_()
    assert torch.equal(shuffled_indices(9, 0, 9, seed=0), kept)


@pytest.mark.parametrize(("n", "start", "count", "seed"), [(0, 0, 1, 0), (3, -1, 1, 0), (3, 0, -1, 0), (3, 0, 1, -1)])
def test_shuffling_refuses_impossible_numbers(n: int, start: int, count: int, seed: int) -> None:
    with pytest.raises(DataError, match=rf"n={n}, start={start}, count={count}, seed={seed}"):
        shuffled_indices(n, start, count, seed)


# ---------------------------------------------------------------------------------------------------- dataset


def small(**changes: object) -> ImageDataset:
    fields = {
        "name": "small",
        "images": torch.arange(24, dtype=torch.uint8).view(4, 1, 2, 3),
        "labels": torch.tensor([0, 1, 1, 0]),
        "num_classes": 2,
        "class_names": ("a", "b"),
    }
    return ImageDataset(**{**fields, **changes})


def test_batch() -> None:
    dataset = small()
    assert len(dataset) == 4 and dataset.shape == (1, 2, 3)
    images, labels = dataset.batch(torch.tensor([2, 0]))
    assert torch.equal(images, to_unit(dataset.images[[2, 0]])) and images.dtype == torch.float32
    assert labels is not None and labels.tolist() == [1, 0]


def test_batch_without_labels() -> None:
    assert small(labels=None, num_classes=0, class_names=()).batch(torch.tensor([1]))[1] is None


def test_batch_flips_the_chosen_images_left_to_right() -> None:
    images, _ = small().batch(torch.tensor([0, 0]), flip=torch.tensor([True, False]))
    assert to_uint8(images).tolist() == [[[[2, 1, 0], [5, 4, 3]]], [[[0, 1, 2], [3, 4, 5]]]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(4, 1, 2, 3)}, "torch.float32.*give uint8"),
        ({"images": torch.zeros(4, 2, 3, dtype=torch.uint8)}, r"\[4, 2, 3\].*give uint8"),
        ({"images": torch.zeros(0, 1, 2, 3, dtype=torch.uint8)}, "at least one image"),
        ({"class_names": ("a",)}, "1 names for 2 classes"),
        ({"labels": None}, "2 classes but no labels"),
        ({"labels": torch.zeros(4)}, r"give int64 \[4\]"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"int64 \[3\]. Try: give int64 \[4\]"),
        ({"labels": torch.tensor([0, 1, 2, 0])}, r"from 0 to 2: with 2 classes they must lie in 0\.\.1"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, "from -1 to 1"),
    ],
)
def test_dataset_refuses_what_does_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=f"^small: .*{message}"):
        small(**changes)


def test_fingerprint_follows_the_content_and_not_the_name() -> None:
    images = small().images.clone()
    images[3, 0, 1, 2] += 1
    different = [
        small(),
        small(images=images),
        small(images=small().images.view(4, 1, 3, 2)),
        small(labels=torch.tensor([1, 1, 1, 0])),
        small(num_classes=3, class_names=("a", "b", "c")),
        small(labels=None, num_classes=0, class_names=()),
        small(source="x"),
    ]
    assert len({dataset.fingerprint for dataset in different}) == len(different)
    assert small(name="other", class_names=("c", "d")).fingerprint == small().fingerprint
    assert len(small().fingerprint) == 64


# ---------------------------------------------------------------------------------------------- Fashion-MNIST


def test_a_part_of_fashion_mnist(clothes: ImageDataset) -> None:
    assert clothes.name == "fashion-mnist/test" and clothes.images.shape == (500, 1, 28, 28)
    assert clothes.labels is not None and clothes.labels[:4].tolist() == [9, 2, 1, 1]
    assert clothes.labels.bincount().tolist() == [55, 52, 65, 46, 57, 39, 47, 47, 44, 48]
    assert clothes.class_names[9] == "Ankle boot"
    trouser = clothes.images[2, 0]  # dark at the sides and between the legs
    assert trouser[20, [0, 27]].max() == 0 and trouser[20].max() > 200


def test_a_smaller_fashion_mnist_is_the_mean_of_its_pixels_and_another_dataset(clothes: ImageDataset) -> None:
    small = FashionMNIST(split="test", size=14).load()
    assert small.name == "fashion-mnist/test-14" and small.shape == (1, 14, 14)
    means = clothes.images[:100].float().mean((2, 3)) - small.images[:100].float().mean((2, 3))
    assert means.abs().max() < 3  # the filter reaches over the border of the picture
    assert small.fingerprint != clothes.fingerprint


IMAGES, LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


@pytest.fixture
def tiny_fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Two images of 2x3 take the place of Fashion-MNIST; no folder holds them, and no server answers."""
    plain = {
        IMAGES: struct.pack(">HBB3I", 0, 8, 3, 2, 2, 3) + bytes(range(12)),
        LABELS: struct.pack(">HBBI", 0, 8, 1, 2) + bytes([7, 9]),
    }
    sizes = {IMAGES: (2, 2, 3), LABELS: (2,)}
    known = {file: (sizes[file], hashlib.sha256(content).hexdigest()) for file, content in plain.items()}
    monkeypatch.setattr(fashion_mnist, "PUBLISHED", known)
    monkeypatch.setenv("FEWSTEP_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(fashion_mnist, "_FASHION_MNIST_URL", "http://127.0.0.1:9/")  # the discard port: refused
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return {file: gzip.compress(content) for file, content in plain.items()}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch):
    """Serves a folder at the address of the mirror."""
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    def start(folder: Path) -> None:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(fashion_mnist, "_FASHION_MNIST_URL", f"http://127.0.0.1:{server.server_port}/")
        servers.append(server)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_fashion_mnist_is_read_from_each_place(tmp_path: Path, tiny_fashion: dict[str, bytes]) -> None:
    for place in ("cache/fashion-mnist", "data/fashion-mnist", "mine"):
        spec = FashionMNIST(split="test", root=tmp_path / "mine")
        write(tmp_path / place, tiny_fashion)
        dataset = spec.load()
        assert torch.equal(dataset.images, torch.arange(12, dtype=torch.uint8).view(2, 1, 2, 3))
        assert dataset.labels is not None and dataset.labels.tolist() == [7, 9]
        write(tmp_path / place, {IMAGES: b"spoilt"})  # the next round shows that its place comes first
        with pytest.raises(DataError, match=place):
            spec.load()


def test_fashion_mnist_packed_by_another_gzip_is_the_same(tmp_path: Path, tiny_fashion: dict[str, bytes]) -> None:
    other = {file: gzip.compress(gzip.decompress(blob), 1, mtime=5) for file, blob in tiny_fashion.items()}
    assert other != tiny_fashion
    assert len(FashionMNIST(split="test", root=write(tmp_path / "mine", other)).load()) == 2


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda blob: blob[:-9], "is damaged .EOFError"),
        (lambda blob: b"<html>no such page</html>", "is damaged .BadGzipFile"),
        (
            lambda blob: gzip.compress(b"\0\0\x08\x01" + bytes(24)),
            "starts with 00000801.* not 00000803.*magic",
        ),
        (lambda blob: gzip.compress(gzip.decompress(blob)[:-1] + b"x"), "unpacks to sha256"),
        (lambda blob: gzip.compress(gzip.decompress(blob) + b"x"), "unpacks to sha256"),
    ],
)
def test_fashion_mnist_spoilt(
    tmp_path: Path, tiny_fashion: dict[str, bytes], spoil: Callable[[bytes], bytes], message: str
) -> None:
    root = write(tmp_path / "mine", {**tiny_fashion, IMAGES: spoil(tiny_fashion[IMAGES])})
    with pytest.raises(DataError, match=f"mine/{IMAGES} {message}.*: remove it, then run `apt-get install"):
        FashionMNIST(split="test", root=root).load()


def test_a_packed_file_is_not_unpacked_beyond_its_size(tmp_path: Path, tiny_fashion: dict[str, bytes]) -> None:
    """64 MB packed in 64 kB: the memory taken shows that reading stops at the size the file should have."""
    head = gzip.decompress(tiny_fashion[IMAGES])
    packer = zlib.compressobj(wbits=31)
    bomb = packer.compress(head) + b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()
    tracemalloc.start()
    with pytest.raises(DataError, match="sha256"):
        FashionMNIST(split="test", root=write(tmp_path / "mine", {IMAGES: bomb})).load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


@pytest.mark.parametrize("with_root", [False, True])
def test_fashion_mnist_is_downloaded_once(
    tmp_path: Path,
    tiny_fashion: dict[str, bytes],
    serve: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    with_root: bool,
) -> None:
    spec = FashionMNIST(split="test", root=tmp_path / "mine" if with_root else None)
    serve(write(tmp_path / "server", tiny_fashion))
    assert spec.load().images.flatten().tolist() == list(range(12))
    stored = tmp_path / ("mine" if with_root else "cache/fashion-mnist")
    assert {path.name: path.read_bytes() for path in stored.iterdir()} == tiny_fashion  # no temporary files

    monkeypatch.setattr(fashion_mnist, "_FASHION_MNIST_URL", "http://127.0.0.1:9/")
    assert len(spec.load()) == 2


def test_a_wrong_download_is_not_kept(
    tmp_path: Path, tiny_fashion: dict[str, bytes], serve: Callable[[Path], None]
) -> None:
    serve(write(tmp_path / "server", {**tiny_fashion, IMAGES: tiny_fashion[IMAGES][:20]}))
    with pytest.raises(DataError, match=rf"http://127.*{IMAGES} is damaged.*apt-get install dataset-fashion-mnist"):
        FashionMNIST(split="test").load()
    assert not (tmp_path / "cache").exists()


def test_a_download_that_cannot_be_stored(
    tmp_path: Path, tiny_fashion: dict[str, bytes], serve: Callable[[Path], None]
) -> None:
    serve(write(tmp_path / "server", tiny_fashion))
    write(tmp_path, {"cache": b"a file where the folder should be"})
    with pytest.raises(DataError, match=r"cannot be stored in .*cache/fashion-mnist"):
        FashionMNIST(split="test").load()


def test_without_network_the_error_says_what_to_do(tmp_path: Path, tiny_fashion: dict[str, bytes]) -> None:
    with pytest.raises(DataError) as caught:
        FashionMNIST(split="test").load()
    message = str(caught.value)
    assert IMAGES in message and "apt-get install dataset-fashion-mnist" in message
    assert message.endswith(f"into {tmp_path}/cache/fashion-mnist") and f"{tmp_path}/data/fashion-mnist" in message


def test_a_page_that_is_not_there(tmp_path: Path, tiny_fashion: dict[str, bytes], serve: Callable) -> None:
    serve(write(tmp_path / "server", {"other": b""}))
    with pytest.raises(DataError, match=r"cannot be downloaded.*404"):
        FashionMNIST(split="test").load()


# ----------------------------------------------------------------------------------------------------- digits


def test_digits() -> None:
    pytest.importorskip("sklearn")
    dataset = Digits().load()
    assert dataset.images.shape == (1797, 1, 8, 8) and dataset.num_classes == 10
    assert dataset.images.unique().tolist() == [round(value * 255 / 16) for value in range(17)]
    assert dataset.labels is not None and dataset.labels[:10].tolist() == list(range(10))
    assert dataset.images[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"scikit-learn.*pip install 'fewstep\[digits\]'"):
        Digits().load()


# ---------------------------------------------------------------------------------------------- image folders

CATS_AND_DOGS = {
    "dog/2.png": encoded(picture(2)),
    "cat/1.png": encoded(picture(1)),
    "cat/deep/0.PNG": encoded(picture(0)),
    "cat/notes.txt": b"not an image",
    "cat/._1.png": b"left by a desktop",
    ".thumbnails/1.png": b"left by a desktop",
    "empty/readme.md": b"no class",
}


def test_folder_with_a_class_per_sub_folder(tmp_path: Path) -> None:
    dataset = ImageFolder(path=write(tmp_path / "pets", CATS_AND_DOGS)).load()
    assert dataset.name == "pets" and dataset.class_names == ("cat", "dog") and dataset.num_classes == 2
    assert dataset.labels is not None and dataset.labels.tolist() == [0, 0, 1]
    assert torch.equal(dataset.images[:], torch.stack([pixels(picture(k)) for k in (1, 0, 2)]))


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    root = write(tmp_path, {"b.png": encoded(picture(1)), "a.png": encoded(picture(0))})
    dataset = ImageFolder(path=root).load()
    assert dataset.labels is None and dataset.num_classes == 0
    assert torch.equal(dataset.images[0], pixels(picture(0)))


def test_folder_with_dataset_json(tmp_path: Path) -> None:
    labels = [["dog/2.png", 4], ["cat\\1.png", 0], ["cat/deep/0.PNG", 2]]  # a Windows name among them
    root = write(tmp_path, {**CATS_AND_DOGS, "dataset.json": table(labels)})
    dataset = ImageFolder(path=root).load()
    assert dataset.labels is not None and dataset.labels.tolist() == [0, 2, 4]
    assert dataset.class_names == ("0", "1", "2", "3", "4")
    write(root, {"dataset.json": table(None)})
    assert ImageFolder(path=root).load().labels is None


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_formats(tmp_path: Path, kind: str) -> None:
    blob = encoded(picture(), kind)
    root = write(tmp_path, {f"a.{kind.lower()}": blob})
    assert torch.equal(ImageFolder(path=root).load().images[0], pixels(Image.open(io.BytesIO(blob))))


def test_channels(tmp_path: Path) -> None:
    grey, colour = picture(0, mode="L"), picture(1)
    root = write(tmp_path, {"a.png": encoded(grey), "b.png": encoded(colour)})
    three, one = ImageFolder(path=root).load(), ImageFolder(path=root, channels=1).load()
    assert torch.equal(three.images[0], pixels(grey).expand(3, -1, -1))
    assert torch.equal(one.images[1], pixels(colour.convert("L")))
    assert one.shape == (1, 5, 6)


def test_size_crops_the_middle_and_resizes(tmp_path: Path) -> None:
    stripes = np.zeros((20, 60, 3), dtype=np.uint8)
    stripes[:, 20:40] = (10, 200, 90)
    root = write(tmp_path, {"wide.png": encoded(Image.fromarray(stripes)), "small.png": encoded(picture())})
    dataset = ImageFolder(path=root, size=8).load()
    assert torch.equal(dataset.images[1], torch.tensor([10, 200, 90], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8))
    expected = picture().crop((0, 0, 5, 5)).resize((8, 8), Image.Resampling.LANCZOS)
    assert torch.equal(dataset.images[0], pixels(expected))


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    blob = encoded(picture(), "JPEG", exif=exif)
    image = ImageFolder(path=write(tmp_path, {"a.jpg": blob})).load().images[0]
    assert torch.equal(image, pixels(Image.open(io.BytesIO(blob))).rot90(-1, (1, 2)))


def test_linked_class_folders_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "store", CATS_AND_DOGS)
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "felines").symlink_to(tmp_path / "store" / "cat")
    dataset = ImageFolder(path=tmp_path / "subset").load()
    assert dataset.class_names == ("felines",) and len(dataset) == 2


def test_opaque_alpha_is_no_obstacle(tmp_path: Path) -> None:
    image = picture()
    root = write(tmp_path, {"a.png": encoded(image.convert("RGBA"))})
    assert torch.equal(ImageFolder(path=root).load().images[0], pixels(image))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


BAD_IMAGES = [
    pytest.param(b"", r"cannot be read as PNG, JPEG or WEBP .*: replace or remove", id="empty"),
    pytest.param(b"GIF89a-not-really", "cannot be read as PNG, JPEG or WEBP", id="not an image"),
    pytest.param(encoded(picture(), "BMP"), "cannot be read as PNG, JPEG or WEBP", id="another format"),
    pytest.param(encoded(picture())[:-40], "cannot be read as PNG, JPEG or WEBP", id="truncated PNG"),
    pytest.param(encoded(picture(), "JPEG")[:-40], "cannot be read as PNG, JPEG or WEBP", id="truncated JPEG"),
    pytest.param(encoded(picture(), "WEBP")[:-9], "cannot be read as PNG, JPEG or WEBP", id="truncated WEBP"),
    pytest.param(png_header(8200, 8200), "8200x8200 pixels, more than 67108864: shrink it", id="large"),
    pytest.param(png_header(10000, 10000), "10000x10000 pixels, more than", id="larger"),
    pytest.param(png_header(50000, 50000), "DecompressionBombError", id="bomb"),
    pytest.param(encoded(picture(9, (6, 4))), r"6x4 RGB, but the first image \(0.png\) is 6x5 RGB.*size", id="shape"),
]


@pytest.mark.parametrize(("blob", "message"), BAD_IMAGES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_named(tmp_path: Path, blob: bytes, message: str) -> None:
    files = {"0.png": encoded(picture()), "1.png": blob}
    with pytest.raises(DataError, match=rf"1\.png .*{message}"):
        ImageFolder(path=write(tmp_path / "folder", files)).load()
    with pytest.raises(DataError, match=rf"1\.png .*{message}"):
        ZipDataset(path=write_zip(tmp_path / "a.zip", files, zipfile.ZIP_DEFLATED)).load()


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (encoded(picture(mode="RGBA")), "transparent pixels.*opaque"),
        (
            encoded(picture(mode="L"), transparency=int(pixels(picture(mode="L"))[0, 0, 0])),
            "transparent pixels",
        ),
        (encoded(Image.fromarray(np.full((5, 6), 999, dtype=np.uint16))), "I;16.*8 bits"),
    ],
)
def test_images_that_need_a_guess_are_refused(tmp_path: Path, blob: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"1\.png .*{message}"):
        ImageFolder(path=write(tmp_path, {"0.png": encoded(picture()), "1.png": blob})).load()


def test_huge_files_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"0.png": encoded(picture())}
    monkeypatch.setattr(image_files, "MAX_BYTES", 50)
    with pytest.raises(DataError, match=r"0\.png has \d+ bytes, more than 50"):
        ImageFolder(path=write(tmp_path / "folder", files)).load()
    with pytest.raises(DataError, match=r"0\.png has \d+ bytes, more than 50"):
        ZipDataset(path=write_zip(tmp_path / "a.zip", files)).load()
    monkeypatch.setattr(image_files, "MAX_BYTES", 2**10)
    files["dataset.json"] = table([["0.png", 0]]) + b" " * 2**10
    with pytest.raises(DataError, match=r"dataset.json has \d+ bytes"):
        ImageFolder(path=write(tmp_path / "folder", files)).load()
    with pytest.raises(DataError, match=r"dataset.json has \d+ bytes"):
        ZipDataset(path=write_zip(tmp_path / "a.zip", files, zipfile.ZIP_DEFLATED)).load()


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        ImageFolder(path=tmp_path / "nowhere").load()
    with pytest.raises(DataError, match=r"a.zip is a file.*kind: zip"):
        ImageFolder(path=write(tmp_path, {"a.zip": b""}) / "a.zip").load()


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no image .*, but nothing"):
        ImageFolder(path=tmp_path).load()
    with pytest.raises(DataError, match=r"holds no image .*, but 2 x .bmp, 1 x no ending: check the path"):
        ImageFolder(path=write(tmp_path, {"a.bmp": b"", "x/b.bmp": b"", "c": b""})).load()


def test_images_beside_class_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"outside of them, first stray\.png. Try: move those"):
        ImageFolder(path=write(tmp_path, {**CATS_AND_DOGS, "stray.png": encoded(picture())})).load()


def test_links_that_count_images_twice(tmp_path: Path) -> None:
    root = write(tmp_path / "pets", CATS_AND_DOGS)
    (root / "dog" / "loop").symlink_to(root)
    with pytest.raises(DataError, match=r"loop.* are one folder"):
        ImageFolder(path=root).load()


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"cannot be listed .*a\.png"):
        ImageFolder(path=tmp_path).load()


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the tests run as root, who may read everything"
)
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    root = write(tmp_path, CATS_AND_DOGS)
    (root / "dog").chmod(0)
    with pytest.raises(DataError, match=r"cannot be listed .*dog"):
        ImageFolder(path=root).load()
    (root / "dog").chmod(0o700)


BAD_TABLES = [
    (b'{"labels": [', "is not valid JSON"),
    (b"\xff\xfe\x00", "is not valid JSON"),
    (b"[" * 10**6, "is not valid JSON"),
    (b'{"labels": [["a.png", ' + b"9" * 5000 + b"]]}", "is not valid JSON"),
    (b"[]", 'has no entry "labels"'),
    (b"{}", 'has no entry "labels"'),
    (table({"a.png": 0}), '"labels" is not a list'),
    (table([["a.png", 0], ["b.png"]]), r"entry 1 is \['b.png'\]: write"),
    (table([["a.png", "0"], ["b.png", 0]]), r"entry 0 is \['a.png', '0'\]: write"),
    (table([["a.png", 0.5], ["b.png", 0]]), r"entry 0 is \['a.png', 0.5\]: write"),
    (table([["a.png", True], ["b.png", 0]]), "entry 0 .*: write"),
    (table([["a.png", [0, 1]], ["b.png", [1, 0]]]), "entry 0 .*: write"),
    (b'{"labels": [' + b"[" * 400 + b"]" * 400 + b"]}", "nested deeper than 100 levels.*: write"),
    (table([["a.png", 0], ["b.png", -1]]), r"gives b.png the label -1: classes go from 0"),
    (table([["a.png", 0], ["b.png", 100_000]]), r"gives b.png the label 100000: classes go from 0 to 99999"),
    (table([["a.png", 0], ["a.png", 0], ["b.png", 0]]), "lists a.png twice"),
    (table([["a.png", 0]]), "no label for 1 of 2 images, first b.png: add them"),
    (table([]), "no label for 2 of 2 images"),
    (table([["a.png", 0], ["b.png", 1], ["c.png", 1]]), "labels 1 images that are not there, first c.png"),
]


@pytest.mark.parametrize(("blob", "message"), BAD_TABLES)
def test_labels_that_do_not_fit(tmp_path: Path, blob: bytes, message: str) -> None:
    files = {"a.png": encoded(picture(0)), "b.png": encoded(picture(1)), "dataset.json": blob}
    with pytest.raises(DataError, match=f"folder/dataset.json.* {message}|folder/dataset.json: {message}"):
        ImageFolder(path=write(tmp_path / "folder", files)).load()
    with pytest.raises(DataError, match=f"a.zip/dataset.json.* {message}|a.zip/dataset.json: {message}"):
        ZipDataset(path=write_zip(tmp_path / "a.zip", files)).load()


def test_messages_stay_short_whatever_the_file_holds(tmp_path: Path) -> None:
    files = {"a.png": encoded(picture()), "dataset.json": table([["x" * 10**5, None]])}
    with pytest.raises(DataError, match="entry 0") as caught:
        ImageFolder(path=write(tmp_path, files)).load()
    assert len(str(caught.value)) < 400


def test_folder_fingerprint_follows_names_sizes_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(place: str, files: dict[str, bytes], **options: int) -> str:
        return ImageFolder(path=write(tmp_path / place, files), **options).load().fingerprint

    first = fingerprint("1", CATS_AND_DOGS)
    assert fingerprint("elsewhere/2", CATS_AND_DOGS) == first
    renamed = {name.replace("2.png", "3.png"): blob for name, blob in CATS_AND_DOGS.items()}
    longer = {**CATS_AND_DOGS, "dog/2.png": CATS_AND_DOGS["dog/2.png"] + b"\0"}
    labels = [["dog/2.png", 1], ["cat/1.png", 1], ["cat/deep/0.PNG", 0]]
    changed = [
        fingerprint("3", renamed),
        fingerprint("4", longer),
        fingerprint("5", {**CATS_AND_DOGS, "dataset.json": table(labels)}),
        fingerprint("6", CATS_AND_DOGS, channels=1),
        fingerprint("7", CATS_AND_DOGS, size=5),
    ]
    assert len({first, *changed}) == 6
    monkeypatch.setattr(image_files, "_EAGER_BYTES", 0)
    assert fingerprint("8", CATS_AND_DOGS) == first


# ------------------------------------------------------------------------------------------------------- lazy


@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([39, 0, 7, 7, -1]),
        torch.empty(0, dtype=torch.int64),
        torch.arange(40) % 3 == 0,
        slice(3, 30, 2),
        5,
    ],
)
def test_lazy_images_are_indexed_like_a_tensor(tmp_path: Path, lazy: None, indices: torch.Tensor) -> None:
    root = write(tmp_path, {f"{k:02}.png": encoded(picture(k)) for k in range(40)})
    images = ImageFolder(path=root).load().images
    expected = torch.stack([pixels(picture(k)) for k in range(40)])
    assert isinstance(images, LazyImages) and images.shape == expected.shape and len(images) == 40
    assert images[indices].dtype == torch.uint8 and torch.equal(images[indices], expected[indices])
    with pytest.raises(IndexError):
        images[torch.tensor([40])]


def test_small_sets_are_decoded_once(tmp_path: Path) -> None:
    assert isinstance(ImageFolder(path=write(tmp_path, CATS_AND_DOGS)).load().images, torch.Tensor)


def test_lazy_batches(tmp_path: Path, lazy: None) -> None:
    dataset = ImageFolder(path=write(tmp_path, CATS_AND_DOGS)).load()
    images, labels = dataset.batch(torch.tensor([2, 0]))
    assert torch.equal(images, to_unit(torch.stack([pixels(picture(2)), pixels(picture(1))])))
    assert labels is not None and labels.tolist() == [1, 0]


def test_a_lazy_set_names_the_broken_image_when_it_comes_to_it(tmp_path: Path, lazy: None) -> None:
    root = write(tmp_path, {"0.png": encoded(picture()), "1.png": encoded(picture())[:60], "2.png": encoded(picture())})
    dataset = ImageFolder(path=root).load()
    dataset.batch(torch.tensor([0, 2]))
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        dataset.batch(torch.tensor([0, 1]))
    (root / "2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png cannot be read .*FileNotFoundError"):
        dataset.batch(torch.tensor([2]))


# ------------------------------------------------------------------------------------------------------- zips

EDM_ZIP = {
    "00000/img00000001.png": encoded(picture(1)),
    "00000/img00000000.png": encoded(picture(0)),
    "dataset.json": table([["00000/img00000000.png", 6], ["00000/img00000001.png", 0]]),
    "README": b"ignored",
    "__MACOSX/00000/img00000000.png": b"ignored",
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("limit", [0, 2**30])
def test_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: int, limit: int) -> None:
    monkeypatch.setattr(image_files, "_EAGER_BYTES", limit)
    dataset = ZipDataset(path=write_zip(tmp_path / "set.zip", EDM_ZIP, method)).load()
    assert dataset.name == "set.zip" and dataset.num_classes == 7 and dataset.class_names[6] == "6"
    assert dataset.labels is not None and dataset.labels.tolist() == [6, 0]
    assert torch.equal(dataset.images[:], torch.stack([pixels(picture(0)), pixels(picture(1))]))


@pytest.mark.parametrize("labels", [{}, {"dataset.json": table(None)}])
def test_zip_without_labels_in_grey(tmp_path: Path, labels: dict[str, bytes]) -> None:
    files = {"a.png": encoded(picture(mode="L")), **labels}
    dataset = ZipDataset(path=write_zip(tmp_path / "a.zip", files)).load()
    assert dataset.labels is None and torch.equal(dataset.images[0], pixels(picture(mode="L")))


def test_zip_images_are_read_by_many_threads(tmp_path: Path, lazy: None) -> None:
    files = {f"{k:03}.png": encoded(picture(k)) for k in range(200)}
    images = ZipDataset(path=write_zip(tmp_path / "a.zip", files, zipfile.ZIP_DEFLATED)).load().images
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(images[order], torch.stack([pixels(picture(k)) for k in order.tolist()]))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b""}, "holds no image .*, but 1 x .txt"),
        ({}, "holds no image .*, but nothing"),
        (
            {"set/dataset.json": table(None), "set/a.png": encoded(picture())},
            "set/dataset.json, but.*zip the content",
        ),
        ({"a.png": encoded(picture().convert("P"))}, "a.png has pixel format P.*kind: folder"),
        (
            {"a.png": encoded(picture()), "b.png": encoded(picture(mode="L"))},
            "b.png is 6x5 grey, but.* 6x5 RGB",
        ),
    ],
)
def test_zips_that_hold_the_wrong_things(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ZipDataset(path=write_zip(tmp_path / "a.zip", files)).load()


def test_zip_that_is_not_there_or_not_a_zip(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.zip does not exist"):
        ZipDataset(path=tmp_path / "no.zip").load()
    with pytest.raises(DataError, match=r"is a folder.*kind: folder"):
        ZipDataset(path=tmp_path).load()
    whole = write_zip(tmp_path / "a.zip", EDM_ZIP).read_bytes()
    for content in (b"", b"plain text", whole[:-30]):
        with pytest.raises(DataError, match=r"a\.zip cannot be read as a zip file .*: make or fetch it again"):
            ZipDataset(path=write(tmp_path, {"a.zip": content}) / "a.zip").load()


def test_zip_with_a_member_twice(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", EDM_ZIP)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")  # zipfile warns of what this test wants
        archive.writestr("00000/img00000001.png", encoded(picture(5)))
    with pytest.raises(DataError, match=r"img00000001\.png is in the zip file 2 times"):
        ZipDataset(path=path).load()


def patched(path: Path, name: str, offset: int, value: bytes) -> Path:
    """Overwrites bytes of a member's entry in the zip file's central directory."""
    content = bytearray(path.read_bytes())
    start = content.rindex(name.encode()) - 46 + offset  # an entry has 46 bytes before the name
    assert content[start - offset :][:4] == b"PK\x01\x02"
    content[start : start + len(value)] = value
    path.write_bytes(content)
    return path


def test_zip_with_an_encrypted_member(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.png": encoded(picture())})
    with pytest.raises(DataError, match=r"a\.png is encrypted"):
        ZipDataset(path=patched(path, "a.png", 8, b"\1\0")).load()


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_zip_with_unbounded_compression(tmp_path: Path, method: int) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.png": encoded(picture())}, method)
    with pytest.raises(DataError, match=rf"a\.png is packed by method {method}"):
        ZipDataset(path=path).load()


def test_zip_member_that_lies_about_its_size(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", {"a.png": encoded(picture())}, zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        ZipDataset(path=patched(path, "a.png", 24, struct.pack("<I", 70))).load()


def test_zip_member_with_a_wrong_checksum(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", EDM_ZIP)
    with pytest.raises(DataError, match=r"dataset.json cannot be read .*CRC.*: make or fetch"):
        ZipDataset(path=patched(path, "dataset.json", 16, b"\0\0\0\0")).load()


def test_a_zip_writes_nothing_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    path = write_zip(tmp_path / "a.zip", {"../evil.png": encoded(picture()), "/tmp.png": encoded(picture(1))})
    before = sorted(tmp_path.rglob("*"))
    dataset = ZipDataset(path=path).load()
    assert torch.equal(dataset.images[:], pixels(picture(1))[None])  # a name with .. counts as hidden
    assert sorted(tmp_path.rglob("*")) == before and not Path("/tmp.png").exists()


def loads_or_explains(load: Callable[[], object]) -> bool:
    """True if it loads; any error but `DataError` fails the test."""
    try:
        load()
    except DataError:
        return False
    return True


def damaged(blob: bytes, count: int) -> list[bytes]:
    """Copies that are cut off, or have up to four bytes changed."""
    draw = np.random.default_rng(0)
    copies = []
    for k in range(count):
        copy = bytearray(blob[: draw.integers(len(blob))] if k % 4 == 0 else blob)
        for place in draw.integers(len(copy), size=draw.integers(1, 5)) if copy else []:
            copy[place] = draw.integers(256)
        copies.append(bytes(copy))
    return copies


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.filterwarnings("ignore")  # Pillow warns of broken EXIF tags, which may be without influence
def test_a_damaged_image_never_raises_another_error(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    copies = damaged(encoded(picture(), kind, exif=exif), 60)
    spec = ImageFolder(path=tmp_path)
    loaded = [loads_or_explains(write(tmp_path, {"a.png": copy}) and spec.load) for copy in copies]
    assert sum(loaded) < 60


def test_a_damaged_zip_never_raises_another_error(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", EDM_ZIP, zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    directory = whole.index(b"PK\x01\x02")  # most of it is compressed pixels: damage the directory as often
    copies = damaged(whole, 60) + [whole[:directory] + tail for tail in damaged(whole[directory:], 60)]
    loaded = [loads_or_explains(write(tmp_path, {"a.zip": copy}) and ZipDataset(path=path).load) for copy in copies]
    assert 0 < sum(loaded) < 120


def test_a_damaged_fashion_mnist_is_always_noticed(tmp_path: Path, tiny_fashion: dict[str, bytes]) -> None:
    root = write(tmp_path / "mine", tiny_fashion)
    for copy in damaged(tiny_fashion[IMAGES][10:], 60):  # the first ten bytes hold a time, which means nothing
        blob = tiny_fashion[IMAGES][:10] + copy
        assert blob == tiny_fashion[IMAGES] or not loads_or_explains(
            write(root, {IMAGES: blob}) and FashionMNIST(split="test", root=root).load
        )


def test_zip_fingerprint_follows_the_content(tmp_path: Path) -> None:
    def fingerprint(name: str, image: Image.Image, method: int = zipfile.ZIP_STORED) -> str:
        files = {"a.png": encoded(image, compress_level=0)}  # unpacked: all of one length
        return ZipDataset(path=write_zip(tmp_path / name, files, method)).load().fingerprint

    assert len(encoded(picture(0), compress_level=0)) == len(encoded(picture(1), compress_level=0))
    assert fingerprint("1.zip", picture(0)) == fingerprint("2.zip", picture(0), zipfile.ZIP_DEFLATED)
    assert fingerprint("1.zip", picture(0)) != fingerprint("3.zip", picture(1))


# ------------------------------------------------------------------------------------------------------ specs


def test_specs_are_told_apart_by_kind() -> None:
    for given_, expected in [
        ({"kind": "fashion-mnist", "split": "test"}, FashionMNIST(split="test")),
        ({"kind": "digits"}, Digits()),
        ({"kind": "folder", "path": "a", "size": 32}, ImageFolder(path=Path("a"), size=32)),
        ({"kind": "zip", "path": "a.zip"}, ZipDataset(path=Path("a.zip"))),
    ]:
        assert DataSpec.model_validate(given_) == expected
        assert DataSpec.model_validate_json(expected.model_dump_json()) == expected


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "mnist"},
        {"split": "test"},
        {"kind": "digits", "split": "validation"},
        {"kind": "fashion-mnist", "split": "validation"},
        {"kind": "folder"},
        {"kind": "folder", "path": "a", "size": 0},
        {"kind": "folder", "path": "a", "channels": 2},
        {"kind": "zip"},
    ],
)
def test_specs_refuse_what_they_do_not_know(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DataSpec.model_validate(bad)


def test_specs_are_frozen_and_explain_their_fields() -> None:
    with pytest.raises(ValidationError):
        Digits().kind = "digits"
    for spec in (FashionMNIST, ImageFolder, ZipDataset):
        for name, field in spec.model_fields.items():
            assert name == "kind" or field.description, f"{spec.__name__}.{name}"
