"""Nothing that lies in a data set is left out or taken for something else without a word."""

import io
import itertools

import pytest
from PIL import Image

from fewstep.data import ImageFolder, ZipDataset, captioned_images, image_files
from fewstep.system.errors import DataError
from tests.support.images import write, write_zip


def png(value, size=8):
    stream = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(
        stream, "PNG", compress_level=0
    )  # as many bytes whatever the colour
    return stream.getvalue()


@pytest.mark.parametrize("ending", ["bmp", "GIF", "tiff", "heic"])
def test_pictures_that_are_not_read_are_named(tmp_path, ending):
    files = {"a.png": png(1), f"b.{ending}": b"", f"c.{ending}": b"", "notes.txt": b""}
    with pytest.raises(DataError, match=rf"got 2 of another kind as well, first b.{ending}: they would be left out"):
        ImageFolder(path=write(tmp_path / "folder", files)).load()
    with pytest.raises(DataError, match="got 2 of another kind"):
        captioned_images(write(tmp_path / "captioned", files | {"a.txt": b"a cat"}), (8, 8))
    archive = {name: blob for name, blob in files.items() if name != "notes.txt"}
    with pytest.raises(DataError, match="got 2 of another kind"):
        ZipDataset(path=write_zip(tmp_path / "a.zip", archive)).load()


def test_a_file_of_the_same_name_and_size_has_another_fingerprint(tmp_path, monkeypatch):
    def fingerprint(place, value):
        return ImageFolder(path=write(tmp_path / place, {"a.png": png(1), "b.png": png(value)})).load().fingerprint

    assert len(png(2)) == len(png(3)), "or sizes would tell them apart"
    assert fingerprint("one", 2) == fingerprint("two", 2) != fingerprint("three", 3)
    monkeypatch.setattr(image_files, "_EAGER_BYTES", 0)
    assert fingerprint("one", 2) == fingerprint("four", 2) != fingerprint("five", 3)


def test_content_of_large_sets_is_sampled_evenly():
    for count in (1, 1_000, 1_024, 1_025, 5_000, 1_000_000):
        chosen = image_files.spread(count)
        assert len(chosen) == min(count, 1_024) == len(set(chosen)) and chosen[0] >= 0 and chosen[-1] < count
        gaps = {later - earlier for earlier, later in itertools.pairwise(chosen)}
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_images_of_another_content_are_not_taken_for_prepared_ones(tmp_path):
    def fingerprint(place, value):
        return captioned_images(write(tmp_path / place, {"a.png": png(value), "a.txt": b"a cat"}), (8, 8)).fingerprint

    assert fingerprint("one", 2) == fingerprint("two", 2) != fingerprint("three", 3)
