"""Images with captions, for text-to-image: folders, WebDataset tar files, Hugging Face datasets on disk.

`fewstep prepare` reads and encodes them once; a run reads the encoded images (`prepared.py`).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import tarfile
import threading
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fewstep.data.dataset import explained
from fewstep.data.folders import list_files
from fewstep.data.image_files import MAX_BYTES, LazyImages, Size, check_endings, is_hidden, is_image
from fewstep.data.malformed import Malformed, Tolerance
from fewstep.data.text import CaptionRule, decode, json_lines, read_text
from fewstep.system.bounds import parse_json, read_file, reading
from fewstep.system.console import note
from fewstep.system.errors import DataError

__all__ = ["Captioned", "captioned_images"]

FILE_KEYS = ("file_name", "file", "image")
TABLES = ("captions.jsonl", "metadata.jsonl")


@dataclass(frozen=True)
class Captioned:
    """Images, decoded on demand, with one caption each."""

    name: str
    images: LazyImages
    captions: list[str]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of captions, image names, and the content of up to 1,024 images."""
        return hashlib.sha256(json.dumps([self.captions, self.images.fingerprint(strict=False)]).encode()).hexdigest()

    def name_of(self, index: int) -> str:
        """Return the place where an image was found."""
        return self.images.names[index]


def captioned_images(
    path: Path,
    size: int | Size,
    rule: CaptionRule = CaptionRule(),  # noqa: B008  (it is frozen)
    bad: Tolerance | None = None,
) -> Captioned:
    """Read the images at a path with their captions, cropped around their centre to the shape of `size` and resized to it.

    Omitted items are counted and reported: rows and texts without an image, and images whose caption `rule` skips.

    Args:
        path: a folder of images with captions in captions.jsonl or metadata.jsonl (`{"file_name": ..., "caption": ...}`
            a line) or in a .txt file next to each image; a WebDataset .tar file or a folder of them; or a folder of
            `datasets.save_to_disk` with an image and a caption column.
        size: height and width in pixels, or both at once.
        rule: which column it is, and what to make of missing captions and of lists.
        bad: records malformed captions, which are omitted with their images; None: the first is an error.

    Raises:
        DataError: nothing there, an image without a caption or a caption that is empty, a damaged file, too many malformed
            captions.
    """
    path, bad = Path(path).expanduser(), bad or Tolerance()
    if path.is_dir() and (path / "dataset_info.json").exists():
        names, read, captions = _saved_dataset(path, rule, bad)
    elif path.is_file() and path.suffix == ".tar":
        names, read, captions = _tars([path], rule, bad)
    elif path.is_dir() and (tars := sorted(path.glob("*.tar"))):
        names, read, captions = _tars(tars, rule, bad)
    elif path.is_dir():
        names, read, captions = _folder(path, rule, bad)
    else:
        raise DataError(f"no captioned images at {path}: give a folder, a WebDataset .tar file, or a saved dataset")
    bad.check(len(names) + len(bad.items))
    kept = [(name, caption) for name, caption in zip(names, captions, strict=True) if caption is not None]
    if len(kept) < len(names):
        note(f"{path}: {len(names) - len(kept):,} of {len(names):,} images have no caption and were skipped")
    if not kept:
        raise DataError(f"{path}: no image has a caption: write them, or remove --missing-captions skip to see which")
    form = (size, size) if isinstance(size, int) else size
    images = LazyImages(str(path), [name for name, _ in kept], read, 3, form)
    return Captioned(path.name, images, [caption for _, caption in kept])


Found = tuple[Sequence[str], Callable[[str], bytes], Sequence[str | None]]
"""Names of the images, what reads one, and their captions; None where there is none."""


def _folder(root: Path, rule: CaptionRule, bad: Tolerance) -> Found:
    files = sorted(list_files(root))
    names = [name for name in files if is_image(name)]
    if not names:
        raise DataError(f"{root} holds no image: check the path")
    check_endings(root, files)
    tables = [root / name for name in TABLES if (root / name).exists()]
    table = tables[0] if tables else None
    if len(tables) > 1:
        note(f"{root}: the captions are read from {tables[0].name}, {tables[1].name} is not read")
    text_of = {name: str(Path(name).with_suffix(".txt")) for name in names}
    texts = {name for name in files if name.endswith(".txt")}
    before = len(bad.items)
    malformed: set[str] = set()
    captions: dict[str, str | None] = {}
    if table is not None:
        captions, malformed = _table(table, rule, bad)
        known = set(names)
        composed = {_nfc(name): name for name in names}  # file systems of Macs take letters apart
        captions = {name if name in known else composed.get(_nfc(name), name): text for name, text in captions.items()}
        malformed = {name if name in known else composed.get(_nfc(name), name) for name in malformed}
        if passed := texts & set(text_of.values()):
            note(
                f"{root}: the captions are read from {table.name}, {len(passed):,} .txt files beside images are not read"
            )
        if absent := [name for name in captions if name not in known]:
            note(
                f"{table}: {len(absent):,} of {len(captions):,} rows name an image that is not there, the first {absent[0]}"
            )
    else:
        if unused := texts - set(text_of.values()):
            note(f"{root}: {len(unused):,} .txt files have no image of the same name, such as {min(unused)}")
        if shared := len(texts & set(text_of.values())) - sum(text in texts for text in text_of.values()):
            note(f"{root}: {-shared:,} images share their .txt file with another image of the same name")
        for name, text in text_of.items():
            if text in texts:
                malformed.add(name)
                with bad.item(f"{root / text}"):
                    captions[name] = rule.of(read_text(root / text).strip(), str(root / text))
                    malformed.remove(name)
    names = [name for name in names if name not in malformed]
    missing = [name for name in names if name not in captions]
    if table is not None and 0 < len(missing) <= len(bad.items) - before - len(malformed):
        names, missing = [name for name in names if name in captions], []  # their rows are those that no one can read
    if missing and rule.missing == "refuse":
        where = table.name if table else "a .txt file of the same name"
        raise DataError(
            f"{root}: {len(missing)} of {len(names)} images have no caption in {where}, first {missing[0]}: add it, remove "
            "the image, or say --missing-captions skip"
        )
    return names, lambda name: read_file(root / name, MAX_BYTES), [captions.get(name) for name in names]


def _table(table: Path, rule: CaptionRule, bad: Tolerance) -> tuple[dict[str, str | None], set[str]]:
    """Captions by image name, and the names in malformed rows."""
    captions: dict[str, str | None] = {}
    malformed: set[str] = set()
    for number, row in json_lines(table, bad):
        where = f"{table}, line {number}"
        with bad.item(where):
            name = next((row[key] for key in FILE_KEYS if isinstance(row, dict) and key in row), None)
            if not isinstance(name, str):
                raise Malformed(f'{where}: write {{"file_name": "a.png", "caption": "..."}}')
            name = name.replace("\\", "/").removeprefix("./")  # tables written on Windows
            malformed.add(name)
            if rule.key(list(row)) is None:
                raise Malformed(f'{where}: write {{"file_name": "a.png", "caption": "..."}}')
            caption = rule.in_row(row, where)
            if name in captions and captions[name] != caption:
                raise DataError(f"{where}: {name} has another caption already. Try: keep one row an image")
            captions[name] = caption
            malformed.remove(name)
    return captions, malformed


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _tars(paths: Sequence[Path], rule: CaptionRule, bad: Tolerance) -> Found:
    """WebDataset: images in tar files, each with `NAME.txt` or `NAME.json`.

    NAME is the image's name without its ending, or, as the format has it, what stands before the name's first dot. Where
    both `a.jpg` and `a.mask.png` are there, the second belongs to the first and is no image of its own.
    """
    places: dict[str, tuple[int, int, int]] = {}  # name -> file, offset, size
    captions: dict[str, Any] = {}
    files: list[Path] = []
    contradicted: list[str] = []
    for path in paths:
        others: list[str] = []
        with explained(f"{path} cannot be read as a tar file", "make or fetch it again"), tarfile.open(path) as archive:
            while (member := archive.next()) is not None:
                cast(Any, archive).members.clear()  # it would keep a kilobyte of each
                name = f"{path.name}/{member.name}"
                if not member.isfile() or is_hidden(member.name.removeprefix("./")):
                    continue
                if is_image(member.name):
                    with bad.item(name):
                        if name in places:
                            raise Malformed(f"{name} is in the tar file twice: the first is used")
                        places[name] = (len(files), member.offset_data, member.size)
                elif member.name.endswith((".txt", ".json")):
                    stream = archive.extractfile(member)
                    assert stream is not None, "a file, by isfile"
                    stem, found = name.rpartition(".")[0], _MALFORMED
                    with bad.item(name):
                        if member.size > _MOST_CAPTION:
                            raise Malformed(f"{name} must have at most {_MOST_CAPTION:,} bytes, got {member.size:,}")
                        found = _caption_of_member(name, decode(stream.read(), name), rule)
                    there = captions.get(stem)
                    if found is _NONE or found is None or found is _MALFORMED:
                        if found is not _NONE:
                            captions.setdefault(stem, found)
                    elif there is None or there is _MALFORMED:  # .json may say null where .txt has the text
                        captions[stem] = found
                    elif there != found:
                        contradicted.append(stem)
                else:
                    others.append(member.name)
        check_endings(path, others)
        files.append(path)
    if contradicted:
        note(
            f"{paths[0].parent}: {len(contradicted):,} images have two captions that differ, such as {contradicted[0]}.txt and "
            ".json: the one that comes first in the tar file is used"
        )
    stems = {name: name.rpartition(".")[0] for name in places}
    plain = set(stems.values())
    companions = {
        name for name, stem in stems.items() if stem not in captions and stem != _key(name) and _key(name) in plain
    }
    if companions:
        note(
            f"{paths[0].parent}: {len(companions):,} pictures that belong to others of their name were left out, such as "
            f"{min(companions)}"
        )
    names = sorted(places.keys() - companions)
    if not names:
        raise DataError(f"{paths[0]} holds no image: check the path")
    of_key: dict[str, list[str]] = {}
    for stem in captions:
        of_key.setdefault(_key(f"{stem}."), []).append(stem)
    owners: dict[str, str] = {}
    kept: list[str] = []
    texts: list[str | None] = []
    for name in names:
        key = _key(name)
        found = [stem for stem in (stems[name], key) if stem in captions] or of_key.get(key, [])
        if not found and rule.missing == "refuse":
            raise DataError(f"{name} has no caption: WebDataset keeps it as {key}.txt or .json")
        if len(set(found)) > 1 and found[0] != stems[name]:
            raise DataError(f"{name} may have the caption {found[0]} or {found[1]}. Try: keep one")
        if found and owners.setdefault(found[0], name) != name:
            raise DataError(f"{name} and {owners[found[0]]} share the caption {found[0]}. Try: give each its own")
        if found and captions[found[0]] is _MALFORMED:
            continue
        with bad.item(name):
            texts.append(rule.of(captions[found[0]], f"{found[0]}.txt or .json") if found else None)
            kept.append(name)
    if unused := captions.keys() - owners.keys():
        note(f"{paths[0].parent}: {len(unused):,} captions have no image, such as {min(unused)}")
    streams, lock = [path.open("rb") for path in files], threading.Lock()

    def read(name: str) -> bytes:
        file, offset, size = places[name]
        with lock:
            if size > MAX_BYTES:
                raise Malformed(f"{name} must have at most {MAX_BYTES:,} bytes, got {size:,}")
            streams[file].seek(offset)
            return streams[file].read(size)

    return kept, read, texts


_NONE = object()  # no text at all, unlike a caption that is null
_MOST_CAPTION = 1 << 20  # bytes of a caption's file in a tar
_MALFORMED = object()


def _key(name: str) -> str:
    """Part of a member's name before its first dot."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def _caption_of_member(name: str, text: str, rule: CaptionRule) -> Any:
    """Read the caption in a member of a tar file; `_NONE` where it has no such place."""
    if not name.endswith(".json"):
        return text.strip()
    try:
        row = parse_json(text)
    except ValueError as error:
        raise Malformed(f"{name} is not JSON ({error}): make the file again") from None
    if isinstance(row, str | list):
        return row
    key = rule.key(list(row)) if isinstance(row, dict) else None
    return _NONE if key is None else row[key]


def _saved_dataset(path: Path, rule: CaptionRule, bad: Tolerance) -> Found:
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            f"{path} is a saved dataset, which needs the package datasets: pip install 'fewstep[captions]'"
        ) from None
    with reading(path, DataError):
        dataset = library.load_from_disk(str(path))
    columns = dataset.column_names
    if isinstance(columns, dict):
        raise DataError(f"{path} holds several splits ({', '.join(columns)}): give the folder of one of them")
    caption = rule.key(columns)
    if caption is None or "image" not in columns:
        raise DataError(f"{path} has columns {', '.join(columns)}: wanted are image and one of {rule.keys()}")
    pictures = dataset.cast_column("image", library.Image(decode=False))

    def read(name: str) -> bytes:
        row = pictures[int(name)]["image"]
        return row["bytes"] if row["bytes"] is not None else read_file(row["path"], MAX_BYTES)

    names: list[str] = []
    texts: list[str | None] = []
    for number, text in enumerate(dataset[caption], 1):
        with bad.item(f"{path}, row {number}"):
            texts.append(rule.of(text, f"{path}, row {number}"))
            names.append(str(number - 1))
    return names, read, texts
