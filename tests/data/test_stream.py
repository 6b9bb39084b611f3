"""What a training run reads: the same images at a place whatever was read before, and the next batch read meanwhile."""

import threading

import pytest
import torch

from fewstep.data import Digits, ImageDataset, Stream, shuffled_indices
from fewstep.system.errors import DataError


class Spy(ImageDataset):
    """Notes what is read and by whom; cannot read a batch that contains the index `damaged`."""

    damaged = -1

    def batch(self, indices, flip=None):
        self.__dict__.setdefault("read", []).append((indices.tolist(), threading.current_thread()))
        if self.damaged in indices.tolist():
            raise DataError("image 7 is damaged")
        return super().batch(indices, flip)


@pytest.fixture
def data():
    found = Digits().load()
    return Spy(**{name: getattr(found, name) for name in found.__dataclass_fields__})


def test_a_place_holds_the_same_whatever_was_read_before(data):
    """In order, out of order and resumed; mirrored images are those of a generator of the place's own."""
    whole = [Stream(data, 3, flip=True).batch(at, 4) for at in (0, 4, 8)]
    stream = Stream(data, 3, flip=True)
    for number in (2, 0, 0, 1):
        for mine, other in zip(stream.batch(4 * number, 4, then=4 * number + 4), whole[number], strict=True):
            assert torch.equal(mine, other)
    plain, labels = data.batch(shuffled_indices(len(data), 4, 4, 3))
    assert torch.equal(whole[1][1], labels)
    turned = [bool((a != b).any()) for a, b in zip(whole[1][0], plain, strict=True)]
    assert all(torch.equal(a, b.flip(-1) if t else b) for a, b, t in zip(whole[1][0], plain, turned, strict=True))
    many = Stream(data, 3, flip=True).batch(0, 1000)[0]
    share = (many != data.batch(shuffled_indices(len(data), 0, 1000, 3))[0]).flatten(1).any(1).float().mean()
    assert 0.4 < share < 0.6  # nearly no digit is its own mirror image


def test_the_next_batch_is_read_meanwhile_and_none_twice(data):
    stream = Stream(data, 0)
    stream.batch(0, 4, then=4)
    stream.batch(0, 4, then=4)  # the other player's turn
    stream.batch(4, 4, then=8)
    stream.batch(8, 4)
    places = [shuffled_indices(len(data), at, 4, 0).tolist() for at in (0, 4, 8)]
    assert [indices for indices, _ in data.read] == places
    assert all(thread is not threading.current_thread() for _, thread in data.read)


def test_an_error_comes_with_the_batch_that_has_it(data):
    stream = Stream(data, 0)
    object.__setattr__(data, "damaged", shuffled_indices(len(data), 4, 4, 0)[1].item())
    stream.batch(0, 4, then=4)
    with pytest.raises(DataError, match="image 7 is damaged"):
        stream.batch(4, 4, then=8)
    stream.batch(8, 4)
