"""One reader for text: every encoding, end of line and kind of caption that people's files have."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fewstep.data import CaptionRule, Tolerance, captioned_images
from fewstep.data.text import decode, lines_of
from fewstep.system.console import note
from fewstep.system.errors import DataError
from fewstep.teachers.prompts import Prompts, prepare_prompts, read_prompt_file
from tests.support.images import write_tar

# what str.splitlines() takes for the end of a line, and JSON and text files do not
SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]


@pytest.fixture(autouse=True)
def _fresh_notes():
    note.cache_clear()


def encoded(prompts, folder):
    """A prepared folder of stand-in embeddings."""
    prepare_prompts(folder, prompts, lambda texts: {"text": torch.zeros(len(texts), 2)}, {"text": torch.zeros(2)}, {})
    return Prompts.read(folder, {})


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("form", ["txt", "jsonl", "escaped.jsonl"])
def test_separators_stay_inside_prompts(separator, form, tmp_path):
    prompts = [f"a lighthouse{separator}in a storm", "a dog"]
    file = tmp_path / f"p.{form}"
    lines = (
        prompts if form == "txt" else [json.dumps({"caption": text}, ensure_ascii=form != "jsonl") for text in prompts]
    )
    file.write_bytes("".join(f"{line}\n" for line in lines).encode())
    assert read_prompt_file(file) == prompts
    assert list(encoded(prompts, tmp_path / "p").names) == prompts


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1))
@settings(max_examples=20, deadline=None)
def test_any_prompts_survive_preparation(prompts):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        assert list(encoded(prompts, Path(folder)).names) == prompts


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_files_of_windows(mark, end, tmp_path, capsys):
    (tmp_path / "p.txt").write_bytes(mark + f"ein Bär{end}{end}a dog{end} {end}".encode())
    assert read_prompt_file(tmp_path / "p.txt") == ["ein Bär", "a dog"]
    assert "2 blank line(s) were skipped, the first is line 2" in capsys.readouterr().err
    rows = f'{{"caption": "ein Bär"}}{end}{end}"a dog"'
    (tmp_path / "p.jsonl").write_bytes(mark + rows.encode())
    assert read_prompt_file(tmp_path / "p.jsonl") == ["ein Bär", "a dog"]
    assert "p.jsonl: 1 blank line(s)" in capsys.readouterr().err


def test_lines_end_at_line_feeds_alone():
    assert lines_of("a\nb\r\nc") == ["a", "b", "c"] and lines_of("a\n\n") == ["a", ""] and lines_of("") == []
    assert lines_of("a\rb\u2028c\n") == ["a\rb\u2028c"]


@pytest.mark.parametrize(
    "data, problem",
    [
        ("a\nb".encode("utf-16"), "got UTF-16, not UTF-8"),
        ("a\nb".encode("utf-32"), "got UTF-32, not UTF-8"),
        ("a cat\nb".encode("utf-16-le"), "line 1 .* UTF-16 without a mark"),
        ("a cat\nein Bär\n".encode("latin-1"), r"p.txt, line 2 .* the byte 0xe4 \(byte 11"),
    ],
)
def test_other_encodings_are_named_with_their_line(data, problem, tmp_path):
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(DataError, match=problem):
        read_prompt_file(tmp_path / "p.txt")
    with pytest.raises(DataError, match="Try: save it as UTF-8"):
        decode(data, "p.txt")


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"caption": None}, r"line 2: the caption is missing \(null\)"),
        ({"caption": float("nan")}, r"line 2: the caption is missing"),
        ({"caption": ["a", "b"]}, r"line 2: a caption must be one text, got a list of 2"),
        ({"caption": []}, "line 2: the caption is missing"),
        ({"caption": 5}, "line 2: a caption must be text, got 5"),
        ({"caption": {"en": "a"}}, "line 2: a caption must be text, got"),
        ({"caption": "  "}, "line 2: this caption is empty"),
        ({"caption": "\ud83d"}, "line 2: the caption holds half a character"),
        ({"other": "a"}, "line 2 has no text under caption, text, prompt"),
        ([1], "line 2 has no text under"),
    ],
)
def test_rows_without_one_caption_are_refused_with_their_number(row, problem, tmp_path):
    (tmp_path / "p.jsonl").write_text('"a cat"\n' + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=problem):
        read_prompt_file(tmp_path / "p.jsonl")


def test_a_setting_chooses(tmp_path, capsys):
    rows = [{"caption": ["a", "longer"], "alt": "x"}, {"caption": None, "alt": "y"}, {"caption": ["one"], "alt": "z"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "p.jsonl"
    assert read_prompt_file(file, CaptionRule(several="first", missing="skip")) == ["a", "one"]
    assert "1 of 3 rows have no caption and were skipped" in capsys.readouterr().err
    assert read_prompt_file(file, CaptionRule(several="longest", missing="skip")) == ["longer", "one"]
    assert read_prompt_file(file, CaptionRule(column="alt")) == ["x", "y", "z"]
    with pytest.raises(DataError, match="has no text under title"):
        read_prompt_file(file, CaptionRule(column="title"))


def test_captions_of_a_table(tmp_path, capsys):
    """.parquet: null, lists, numbers; the same rule."""
    import pyarrow
    import pyarrow.parquet

    def table(**columns):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
        return tmp_path / "p.parquet"

    with pytest.raises(DataError, match=r"row 2: the caption is missing \(null\)"):
        read_prompt_file(table(caption=["a cat", None]))
    with pytest.raises(DataError, match=r"row 1: a caption must be one text, got a list of 2"):
        read_prompt_file(table(caption=[["a", "b"], ["c"]]))
    with pytest.raises(DataError, match=r"row 1: a caption must be text, got 3"):
        read_prompt_file(table(caption=[3]))
    with pytest.raises(DataError, match=r"has columns title, none of caption"):
        read_prompt_file(table(title=["a"]))
    rule = CaptionRule(several="longest", missing="skip")
    assert read_prompt_file(table(text=[["a", "bb"], None]), rule) == ["bb"]
    assert read_prompt_file(table(text=["a\u2028b"])) == ["a\u2028b"]
    (tmp_path / "q.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"cannot be read as .parquet"):
        read_prompt_file(tmp_path / "q.parquet")


def test_a_changed_list_of_prompts_is_refused(tmp_path):
    encoded(["a cat", "a dog"], tmp_path)
    (tmp_path / "prompts.jsonl").write_text('"a cat"\n"a fox"\n')
    with pytest.raises(DataError, match="was changed after its prompts were encoded"):
        Prompts.read(tmp_path, {})
    (tmp_path / "prompts.jsonl").write_text('"a cat\n')
    with pytest.raises(DataError, match="cannot be read"):
        Prompts.read(tmp_path, {})


# -- captions of images --------------------------------------------------------------------------------------------------


def png(number):
    picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def test_caption_files_of_windows(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "ein Bär\u2028am Meer\r\n".encode())
    assert captioned_images(tmp_path, (16, 16)).captions == ["ein Bär\u2028am Meer"]
    (tmp_path / "a.txt").write_bytes("ein Bär".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.txt, line 1 must be UTF-8 text, got the byte 0xe4"):
        captioned_images(tmp_path, (16, 16))


def test_tables_of_windows_and_rows_without_an_image(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"images/{name}.png").write_bytes(png(0))
    rows = [("images\\a.png", "a\u2028cat"), ("./images/b.png", "a dog"), ("images/c.png", "gone")]
    text = "".join(json.dumps({"file_name": n, "caption": c}, ensure_ascii=False) + "\r\n" for n, c in rows)
    (tmp_path / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert captioned_images(tmp_path, (16, 16)).captions == ["a\u2028cat", "a dog"]
    assert "1 of 3 rows name an image that is not there, the first images/c.png" in capsys.readouterr().err
    with (tmp_path / "captions.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"file_name": "images/a.png", "caption": "another"}\n')
    with pytest.raises(DataError, match=r"line 4: images/a.png has another caption already"):
        captioned_images(tmp_path, (16, 16))


def test_images_without_a_caption_are_refused_or_skipped(tmp_path, capsys):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(png(0))
    (tmp_path / "captions.jsonl").write_text(
        '{"file_name": "a.png", "caption": null}\n{"file_name": "b.png", "caption": ["x", "yy"]}\n'
    )
    with pytest.raises(DataError, match=r"captions.jsonl, line 1: the caption is missing"):
        captioned_images(tmp_path, (16, 16))
    found = captioned_images(tmp_path, (16, 16), CaptionRule(several="longest", missing="skip"))
    assert found.captions == ["yy"] and found.images.shape[0] == 1
    assert "2 of 3 images have no caption and were skipped" in capsys.readouterr().err


def test_names_with_dots_keep_their_own_captions(tmp_path):
    members = {"img.v1.png": png(0), "img.v1.txt": b"one", "img.v2.png": png(1), "img.v2.txt": b"two"}
    assert captioned_images(write_tar(tmp_path / "a.tar", members), (16, 16)).captions == ["one", "two"]
    shared = {"img.v1.png": png(0), "img.v2.png": png(1), "img.txt": b"one"}
    with pytest.raises(DataError, match="share the caption"):
        captioned_images(write_tar(tmp_path / "b.tar", shared), (16, 16))
    extension = {"0.rgb.png": png(0), "0.caption.txt": b"one"}
    assert captioned_images(write_tar(tmp_path / "c.tar", extension), (16, 16)).captions == ["one"]


def test_masks_are_no_images_and_captions_without_one_are_counted(tmp_path, capsys):
    members = {"0.png": png(0), "0.mask.png": png(1), "0.json": b'{"caption": "one"}', "9.txt": b"gone"}
    found = captioned_images(write_tar(tmp_path / "a.tar", members), (16, 16))
    assert found.captions == ["one"] and found.images.shape[0] == 1
    said = capsys.readouterr().err
    assert "1 pictures that belong to others" in said and "1 captions have no image, such as a.tar/9" in said


@pytest.mark.parametrize(
    "caption, problem",
    [
        (("0.json", b'{"caption": null}'), "the caption is missing"),
        (("0.json", b'{"caption": ["a", "b"]}'), "a list of 2"),
        (("0.json", b"{"), "0.json is not JSON"),
        (("0.txt", b"\xe4"), r"0.txt, line 1 must be UTF-8 text, got the byte 0xe4"),
        (("0.json", b'{"other": 1}'), "has no caption"),
    ],
)
def test_bad_captions_in_tar_files_are_named(caption, problem, tmp_path):
    with pytest.raises(DataError, match=problem):
        captioned_images(write_tar(tmp_path / "a.tar", {"0.png": png(0), caption[0]: caption[1]}), (16, 16))


def test_a_null_beside_a_text_is_no_caption(tmp_path):
    members = {"0.png": png(0), "0.json": b'{"caption": null}', "0.txt": b"one"}
    assert captioned_images(write_tar(tmp_path / "a.tar", members), (16, 16)).captions == ["one"]


@pytest.mark.parametrize("captions", [["a cat", None], [["a cat", "two cats"], ["a dog"]]])
def test_captions_of_a_saved_dataset(captions, tmp_path):
    import datasets

    datasets.disable_progress_bars()
    rows = {"image": [{"bytes": png(0), "path": None}] * 2, "text": captions}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"row [12]: .*caption"):
        captioned_images(tmp_path / "d", (16, 16))
    found = captioned_images(tmp_path / "d", (16, 16), CaptionRule(several="first", missing="skip"))
    assert found.captions == (["a cat"] if None in captions else ["a cat", "a dog"])


def test_lmdb_captions_in_another_encoding_are_refused(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    from fewstep.data import text_latents

    with lmdb.open(str(tmp_path), map_size=2**20) as database, database.begin(write=True) as transaction:
        transaction.put(b"latents_shape", b"1 4 2 2")
        transaction.put(b"latents_0_data", np.zeros((4, 2, 2), np.float16).tobytes())
        transaction.put(b"prompts_0_data", "ein Bär".encode("latin-1"))
    with pytest.raises(DataError, match=r"record prompts_0_data, line 1 must be UTF-8 text"):
        text_latents(tmp_path)


def test_members_of_macs_and_members_that_are_there_twice(tmp_path, capsys):
    members = {
        "._0.png": b"x",
        "__MACOSX/._1.png": b"x",
        "0.png": png(0),
        "0.txt": b"one",
        "./1.png": png(1),
        "./1.txt": b"two",
    }
    assert captioned_images(write_tar(tmp_path / "a.tar", members), 16).captions == ["two", "one"]
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for name, blob in (
            ("0.png", png(0)),
            ("0.txt", b"one"),
            ("0.png", png(1)),
            ("1.png", png(2)),
            ("1.txt", b"two"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(blob)
            archive.addfile(member, io.BytesIO(blob))
    with pytest.raises(DataError, match=r"b.tar/0.png is in the tar file twice"):
        captioned_images(tmp_path / "b.tar", 16)
    bad = Tolerance(0.4)
    found = captioned_images(tmp_path / "b.tar", 16, bad=bad)
    assert found.captions == ["one", "two"] and len(bad.items) == 1
    assert torch.equal(found.images[0], captioned_images(tmp_path / "a.tar", 16).images[1])  # the first of the two


def test_captions_that_contradict_each_other_are_said(tmp_path, capsys):
    members = {
        "0.png": png(0),
        "0.txt": b"one",
        "0.json": b'{"caption": "another"}',
        "1.png": png(1),
        "1.json": b'["a", "bb"]',
    }
    with pytest.raises(DataError, match="a caption must be one text, got a list of 2"):
        captioned_images(write_tar(tmp_path / "a.tar", members), 16)
    assert captioned_images(tmp_path / "a.tar", 16, CaptionRule(several="longest")).captions == ["one", "bb"]
    assert "1 images have two captions that differ, such as a.tar/0.txt" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"got 1 of another kind as well, first 9.bmp"):
        captioned_images(write_tar(tmp_path / "b.tar", members | {"9.bmp": b"x"}), 16, CaptionRule(several="first"))


def test_what_lies_beside_the_captions_that_are_read_is_said(tmp_path, capsys):
    for name in ("a.png", "e\u0301.png"):
        (tmp_path / name).write_bytes(png(0))
    (tmp_path / "a.txt").write_text("not read")
    rows = [
        {"file_name": "a.png", "caption": "x"},
        {"file_name": "\u00e9.png", "caption": "y"},
    ]  # a letter in one piece
    for table in ("captions.jsonl", "metadata.jsonl"):
        (tmp_path / table).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert captioned_images(tmp_path, 16).captions == ["x", "y"]
    said = capsys.readouterr().err
    assert "metadata.jsonl is not read" in said and "1 .txt files beside images are not read" in said
    (tmp_path / "captions.jsonl").unlink()
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "e\u0301.png").unlink()
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.png").read_bytes())
    assert captioned_images(tmp_path, 16).captions == ["not read"] * 2
    assert "1 images share their .txt file" in capsys.readouterr().err


def test_marks_and_zero_bytes_inside_a_file(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa cat\n\xef\xbb\xbfa dog\n")
    assert read_prompt_file(tmp_path / "p.txt") == ["a cat", "a dog"]
    (tmp_path / "p.jsonl").write_text('"a\\u0000b"\n')
    with pytest.raises(DataError, match="line 1: the caption holds a zero byte"):
        read_prompt_file(tmp_path / "p.jsonl")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_with_commas(mark, tmp_path, capsys):
    """Quotes, line feeds and commas inside a caption; Windows' line ends."""
    note.cache_clear()
    rows = 'image,caption,text\r\n1.png,"a cat, with ""quotes"" and\na line feed",x\r\n2.png,a dog,y\r\n'
    (tmp_path / "a.csv").write_bytes((mark + rows).encode())
    assert read_prompt_file(tmp_path / "a.csv") == ['a cat, with "quotes" and\na line feed', "a dog"]
    assert "rows have caption and text: captions are read from caption" in capsys.readouterr().err
    assert read_prompt_file(tmp_path / "a.csv", CaptionRule(column="text")) == ["x", "y"]
    (tmp_path / "a.tsv").write_text("image\tcaption\n1.png\ta cat, a dog\n")
    assert read_prompt_file(tmp_path / "a.tsv") == ["a cat, a dog"]


@pytest.mark.parametrize(
    "rows, problem",
    [
        (
            "caption\na cat, a dog\n",
            r"a.csv, line 2 has more cells than the header. Try: put texts with commas in quotes",
        ),
        ("image,caption\n1.png\n", r"a.csv, line 2: the caption is missing"),
        ("image,words\n1.png,a\n", r"a.csv, line 2 has no text under caption, text, prompt"),
        ('caption\n"a cat\n', r"a.csv cannot be read as .csv beyond line 1"),
        ("", r"must hold prompts, got none"),
    ],
)
def test_tables_that_cannot_be_read_are_named(rows, problem, tmp_path):
    (tmp_path / "a.csv").write_text(rows)
    with pytest.raises(DataError, match=problem):
        read_prompt_file(tmp_path / "a.csv")
