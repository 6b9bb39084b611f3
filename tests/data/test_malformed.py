"""One malformed item of many is left out, counted and named; too many end a preparation."""

import io
import json
import random
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data import Malformed, Prepared, Tolerance, captioned_images
from fewstep.data.prepared import shard_name
from fewstep.system.errors import DataError
from fewstep.teachers.base import Codec
from fewstep.teachers.prepare import prepare_images
from fewstep.teachers.prompts import read_prompt_file
from tests.support.images import write_tar


def picture(number, mode="RGB", size=(24, 20)):
    """A picture of one colour, so that its pixels tell its number."""
    return Image.new("RGB", size, (10 * number, 100, 50)).convert(mode)


def stored(image, form="PNG", **more):
    stream = io.BytesIO()
    image.save(stream, form, **more)
    return stream.getvalue()


def broken():
    """Files that no picture can be read from, by what is wrong with them."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    clear = picture(1).convert("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    return {
        "truncated.jpg": stored(noise, "JPEG")[:400],
        "deep.png": stored(Image.fromarray(np.zeros((9, 9), np.uint16))),
        "clear.png": stored(clear.quantize(8)),
        "empty.png": b"",
    }


def write(folder, files):
    folder.mkdir(parents=True)
    for name, blob in files.items():
        (folder / name).write_bytes(blob)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    return folder


@pytest.fixture
def many(tmp_path):
    """Six pictures and four files that are none."""
    turned = Image.Exif()
    turned[274] = 6  # a photograph taken upright, stored lying
    good = {f"{number}.png": stored(picture(number)) for number in range(4)}
    good |= {"4.jpg": stored(picture(4, "CMYK"), "JPEG"), "5.jpg": stored(picture(5), "JPEG", exif=turned)}
    return write(tmp_path / "images", good | broken()), good


CODEC = Codec(lambda x: x, lambda x: x[:, :1, ::2, ::2], (3, 16, 16), "half")


def prepared(folder, images, share=0.5, shard=3):
    folder.mkdir(exist_ok=True)
    bad = Tolerance(share)
    found = captioned_images(images, (16, 16), bad=bad)
    prompts = sorted(set(found.captions))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    try:
        prepare_images(folder, found, prompts, CODEC, torch.float32, shard=shard, batch=2, bad=bad)
    finally:
        bad.write(folder / "skipped.jsonl")
    return folder


def test_pictures_that_cannot_be_read_are_left_out_and_named(many, tmp_path):
    images, good = many
    data = Prepared(path=prepared(tmp_path / "p", images)).load()
    alone = Prepared(path=prepared(tmp_path / "q", write(tmp_path / "good", good), 0)).load()
    assert len(data) == len(alone) == len(good) and not (tmp_path / "q/skipped.jsonl").exists()
    everything = torch.arange(len(data))
    torch.testing.assert_close(data.batch(everything)[0], alone.batch(everything)[0])
    assert [data.class_names[label] for label in data.labels] == [alone.class_names[label] for label in alone.labels]
    lines = [json.loads(line) for line in (tmp_path / "p/skipped.jsonl").read_text().splitlines()]
    assert {line["item"] for line in lines} == broken().keys()
    problems = " ".join(line["problem"] for line in lines)
    assert "more than 8 bits" in problems and "transparent pixels" in problems and "truncated" in problems
    assert data.images.labels.shape == (6,)


def test_a_stopped_preparation_keeps_its_list(many, tmp_path):
    folder = prepared(tmp_path / "p", many[0])
    before = (folder / "skipped.jsonl").read_text(), Prepared(path=folder).load().fingerprint
    (folder / shard_name(1)).unlink()
    prepared(folder, many[0])
    assert ((folder / "skipped.jsonl").read_text(), Prepared(path=folder).load().fingerprint) == before


def test_a_file_of_malformed_pictures_alone(tmp_path):
    files = {f"{number}.png": stored(picture(number)) for number in range(4)} | {"1.png": b"", "2.png": b""}
    data = Prepared(path=prepared(tmp_path / "p", write(tmp_path / "i", files), shard=1)).load()
    x, labels = data.batch(torch.tensor([1, 0]))
    assert (
        len(data) == 2 and labels.tolist() == [3, 0] and x[:, 0, 0, 0].mul(127.5).add(127.5).round().tolist() == [30, 0]
    )


def test_too_many_end_it_and_are_named_all_the_same(many, tmp_path):
    with pytest.raises(DataError, match=r"\(2 of 10 items are malformed, more than the share of 0.1 .*--max-malformed"):
        prepared(tmp_path / "p", many[0], 0.1)
    assert len((tmp_path / "p/skipped.jsonl").read_text().splitlines()) == 2
    with pytest.raises(DataError, match="must be a share between 0 and 1, got 2"):
        Tolerance(2)


@pytest.mark.parametrize("form", ["beside", "table", "tar"])
@pytest.mark.parametrize("text", [b"\xe4", b'{"caption": 5}', b"{", b'{"caption": "a", "caption": "b"}'])
def test_captions_that_cannot_be_read_are_left_out_with_their_pictures(form, text, tmp_path):
    files = {name: stored(picture(3)) for name in ("0.png", "1.png", "2.png")}
    lines = [b'{"file_name": "%d.png", "caption": "c"}' % number for number in range(3)]
    if form == "beside":
        place = write(tmp_path / "i", files)
        (place / "1.txt").write_bytes(b"\xe4")
    elif form == "table":
        place = tmp_path / "i"
        place.mkdir()
        for name, blob in files.items():
            (place / name).write_bytes(blob)
        lines[1] = text.replace(b'{"caption": 5', b'{"file_name": "1.png", "caption": 5')
        (place / "captions.jsonl").write_bytes(b"\n".join(lines))
    else:
        captions = {f"{number}.json": line for number, line in enumerate(lines)} | {"1.json": text}
        if text.count(b"caption") == 2:
            captions["1.json"] = b"\xe4"  # only the reader of tables looks for repeated keys
        place = write_tar(tmp_path / "i.tar", files | captions)
    bad = Tolerance(0.5)
    found = captioned_images(place, 16, bad=bad)
    assert len(found.captions) == len(found.images) == 2 and len(bad.items) == 1
    assert "1" in bad.items[0][0] or "line 2" in bad.items[0][0]
    with pytest.raises(DataError):
        captioned_images(place, 16)
    with pytest.raises(DataError, match=r"1 of 3 items are malformed"):
        captioned_images(place, 16, bad=Tolerance(0.2))


@pytest.mark.parametrize(
    "name, content",
    [
        ("p.txt", b"a cat\nein B\xe4r\na dog\n"),
        ("p.txt", b"a cat\na\0b\na dog\n"),
        ("p.jsonl", b'"a cat"\n{"caption": \n{"caption": "a dog"}\n'),
        ("p.jsonl", b'"a cat"\n{"caption": 7}\n"a dog"'),
    ],
)
def test_lines_that_cannot_be_read_are_left_out(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    bad = Tolerance(0.5)
    assert read_prompt_file(tmp_path / name, bad=bad) == ["a cat", "a dog"]
    assert [item for item, _ in bad.items] == [f"{tmp_path / name}, line 2"]
    with pytest.raises(DataError, match="1 of 3 items are malformed"):
        read_prompt_file(tmp_path / name, bad=Tolerance(0.3))
    with pytest.raises(Malformed):
        read_prompt_file(tmp_path / name)


def test_a_row_that_is_lost_does_not_excuse_a_picture_that_has_none(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(stored(picture(number)))
    rows = ['{"file_name": "0.png", "caption": "a"}', "{", '{"file_name": "2.png", "caption": "c"}']
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"2 of 4 images have no caption in captions.jsonl, first 1.png"):
        captioned_images(tmp_path, 16, bad=Tolerance(0.5))


def test_texts_without_a_picture_are_counted(tmp_path, capsys):
    folder = write(tmp_path / "i", {"0.png": stored(picture(0))})
    (folder / "lost.txt").write_text("gone")
    assert captioned_images(folder, 16).captions == ["caption of 0.png"]
    assert "1 .txt files have no image of the same name, such as lost.txt" in capsys.readouterr().err


def test_damage_of_any_kind_is_a_malformed_picture(tmp_path):
    """Bytes changed, lost and cut off: nothing else than a picture or a problem comes of it."""
    turned = Image.Exif()
    turned[274], turned[270] = 6, "words"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    whole = [stored(noise, form, exif=turned) for form in ("PNG", "JPEG", "WEBP")]
    draw, files = random.Random(0), {}
    for number in range(300):
        blob = bytearray(whole[number % 3])
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(min(len(blob), draw.choice([60, 300, len(blob)])))
            blob[place : place + draw.choice([1, 1, 1, 9])] = bytes([draw.randrange(256)] * draw.choice([0, 1, 1, 1]))
        files[f"{number:03}.png"] = bytes(blob)
    found = captioned_images(write(tmp_path / "i", files), 16)
    made = found.images.attempt(range(300), [(16, 16)])
    problems = [item for item in made if isinstance(item, Malformed)]
    assert 100 < len(problems) < 300 and all(item.pixels.shape == (3, 16, 16) for item in made if item not in problems)


def test_memory_for_an_item_is_small(tmp_path):
    """Names, places and captions of a million items must fit the memory of a laptop."""
    members = {}
    for number in range(3_000):
        members |= {f"{number:07}.png": b"", f"{number:07}.txt": b"a caption of some eight words, such as most are"}
    write_tar(tmp_path / "a.tar", members)
    tracemalloc.start()
    found = captioned_images(tmp_path / "a.tar", 16)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.captions) == 3_000 and held / 3_000 < 500 and peak / 3_000 < 1_200
