"""DMD2's LMDB: what is read, and what is refused."""

import sys

import numpy as np
import pytest
import torch

from fewstep.data import LmdbDataset
from fewstep.data.dataset import ImageDataset
from fewstep.system.errors import DataError

lmdb = pytest.importorskip("lmdb")


def written(folder, images, labels=None, **changes):
    """A database of the published layout; `changes` replace records (None: leave out)."""
    records = {"images_shape": " ".join(map(str, images.shape)).encode()}
    records |= {f"images_{i}_data": image.tobytes() for i, image in enumerate(images)}
    if labels is not None:
        records |= {"labels_shape": str(len(labels)).encode()}
        records |= {f"labels_{i}_data": np.int64(label).tobytes() for i, label in enumerate(labels)}
    records |= changes
    with lmdb.open(str(folder), map_size=2**24) as env, env.begin(write=True) as transaction:
        for key, value in records.items():
            if value is not None:
                transaction.put(key.encode(), value)
    return LmdbDataset(path=folder)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)


def test_images_and_labels(tmp_path, images, monkeypatch):
    spec = written(tmp_path / "db", images, range(12))
    held = spec.load()
    monkeypatch.setattr("fewstep.data.lmdb_images._EAGER_BYTES", 0)
    lazy = spec.load()
    assert isinstance(held.images, torch.Tensor) and not isinstance(lazy.images, torch.Tensor)
    assert held.num_classes == 12 and held.fingerprint == lazy.fingerprint
    order = torch.tensor([7, 0, 11, 7])
    for a, b in zip(held.batch(order), lazy.batch(order), strict=True):
        assert torch.equal(a, b)
    assert (lazy.images[3].numpy() == images[3]).all() and lazy.images[2:4].shape == (2, 3, 8, 8)
    with pytest.raises(IndexError):
        lazy.images[12]


def test_without_labels(tmp_path, images):
    dataset = written(tmp_path / "db", images).load()
    assert isinstance(dataset, ImageDataset) and dataset.labels is None and dataset.num_classes == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images_5_data": None}, "images_5_data is missing"),
        ({"images_5_data": b"short"}, "5 bytes instead of 192"),
        ({"images_shape": None}, "no usable images_shape"),
        ({"images_shape": b"12 3 eight 8"}, "no usable images_shape"),
        ({"images_shape": b"12 192"}, "not C x H x W"),
        ({"labels_shape": b"11"}, "12 images and 11 labels"),
        ({"labels_3_data": np.int64(-1).tobytes()}, "labels from -1"),
        ({"labels_3_data": b""}, "0 bytes instead of 8"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, images, changes, message):
    with pytest.raises(DataError, match=message):
        written(tmp_path / "db", images, range(12), **changes).load()


def test_no_such_place_and_no_such_package(tmp_path, images, monkeypatch):
    with pytest.raises(DataError, match=r"no data\.mdb"):
        LmdbDataset(path=tmp_path).load()
    spec = written(tmp_path / "db", images)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "data.mdb").write_bytes(b"nothing of this kind" * 1000)
    with pytest.raises(DataError, match="must be a whole LMDB file"):
        LmdbDataset(path=tmp_path / "damaged").load()
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataError, match=r"fewstep\[lmdb\]"):
        spec.load()
