"""CIFAR-10's archive: the published layout is read, anything else is refused and never run."""

import io
import tarfile

import numpy as np
import pytest
import torch

from fewstep.data import Cifar10
from fewstep.system.errors import DataError


def batch(images, labels):
    """A batch file byte for byte as Python 2 and numpy 1 wrote it: protocol 2, byte strings."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    shape = b"M" + len(images).to_bytes(2, "little") + b"M" + (3072).to_bytes(2, "little") + b"\x86"
    pixels = b"T" + images.nbytes.to_bytes(4, "little") + images.tobytes()
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + text(b"b")
        + b"\x87R(K\x01"
        + shape
        + dtype
    )
    array += b"\x89" + pixels + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + text(b"batch_label") + text(b"x") + b"u."


@pytest.fixture
def made():
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, 3).tolist())
        for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    }


def write(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_the_archive_and_its_folder(tmp_path, made):
    files = {name: batch(*content) for name, content in made.items()}
    path = write(tmp_path / "cifar-10-python.tar.gz", files)
    train = Cifar10(path=path).load()
    assert (len(train), train.shape, train.num_classes, train.class_names[3]) == (15, (3, 32, 32), 10, "cat")
    for number in range(5):
        images, labels = made[f"data_batch_{number + 1}"]
        assert torch.equal(train.images[3 * number : 3 * number + 3], torch.from_numpy(images))
        assert train.labels[3 * number : 3 * number + 3].tolist() == labels
    test = Cifar10(path=path, split="test").load()
    assert torch.equal(test.images, torch.from_numpy(made["test_batch"][0]))
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / name).write_bytes(content)
    assert Cifar10(path=tmp_path / "folder").load().fingerprint == train.fingerprint


def test_what_is_no_cifar10_is_refused(tmp_path, made):
    files = {name: batch(*content) for name, content in made.items()}
    with pytest.raises(DataError, match=r"does not exist: give cifar-10-python\.tar\.gz from https"):
        Cifar10(path=tmp_path / "none").load()
    (tmp_path / "text.tar.gz").write_text("hello")
    with pytest.raises(DataError, match=r"damaged, or no \.tar\.gz file"):
        Cifar10(path=tmp_path / "text.tar.gz").load()
    with pytest.raises(DataError, match="has no data_batch_5 in it"):
        Cifar10(path=write(tmp_path / "a.tar.gz", {k: v for k, v in files.items() if k != "data_batch_5"})).load()
    images, labels = made["data_batch_2"]
    for bad in (
        batch(images, labels[:2]),
        batch(images, [1, 2, 200]),
        batch(images[:2], labels),
        b"",
        files["test_batch"][:-50],
    ):
        with pytest.raises(DataError, match="data_batch_2 is no batch of CIFAR-10"):
            Cifar10(path=write(tmp_path / "b.tar.gz", files | {"data_batch_2": bad})).load()
    with pytest.raises(DataError, match=r"refers to posix\.system"):
        Cifar10(path=write(tmp_path / "c.tar.gz", files | {"data_batch_2": b"cposix\nsystem\nU\x02ls\x85R."})).load()
