"""Images with captions, for text-to-image: folders, WebDataset tar files, Hugging Face datasets on disk.

They are read once, by `fewstep prepare`, which encodes them; a run reads what it wrote (`prepared.py`).
"""

from __future__ import annotations

import importlib
import json
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.data.dataset import DataError, explained
from fewstep.data.image_files import LazyImages, is_image, list_files

__all__ = ["CAPTION_KEYS", "Captioned", "caption_in", "captioned_images"]

CAPTION_KEYS = ("caption", "text", "prompt")
FILE_KEYS = ("file_name", "file", "image")
TABLES = ("captions.jsonl", "metadata.jsonl")


@dataclass(frozen=True)
class Captioned:
    """Images, decoded on demand, and a caption of each."""

    name: str
    images: LazyImages
    captions: list[str]


def captioned_images(path: Path, size: int) -> Captioned:
    """The images at a path, cropped to their central square and resized to `size` pixels, with their captions.

    Args:
        path: a folder of images with captions in captions.jsonl or metadata.jsonl (`{"file_name": ..., "caption": ...}`
            a line) or in a .txt file beside each image; a WebDataset .tar file or a folder of them; or a folder of
            `datasets.save_to_disk` with an image and a caption column.
        size: pixels a side.

    Raises:
        DataError: nothing there, an image without a caption or a caption that is empty, a damaged file.
    """
    path = Path(path).expanduser()
    if path.is_dir() and (path / "dataset_info.json").exists():
        names, read, captions = _saved_dataset(path)
    elif path.is_file() and path.suffix == ".tar":
        names, read, captions = _tars([path])
    elif path.is_dir() and (tars := sorted(path.glob("*.tar"))):
        names, read, captions = _tars(tars)
    elif path.is_dir():
        names, read, captions = _folder(path)
    else:
        raise DataError(f"no captioned images at {path}: give a folder, a WebDataset .tar file, or a saved dataset")
    for name, caption in zip(names, captions, strict=True):
        if not caption.strip():
            raise DataError(f"{path}/{name} has an empty caption: write one, or remove the image")
    return Captioned(path.name, LazyImages(str(path), names, read, 3, size), captions)


def caption_in(row: Any) -> str | None:
    """The text of a row of JSON: the row itself, or what is under `caption`, `text` or `prompt`."""
    if isinstance(row, str):
        return row
    found = (row[key] for key in CAPTION_KEYS if isinstance(row, dict) and isinstance(row.get(key), str))
    return next(found, None)


Found = tuple[Sequence[str], Callable[[str], bytes], list[str]]


def _folder(root: Path) -> Found:
    names = [name for name in sorted(list_files(root)) if is_image(name)]
    if not names:
        raise DataError(f"{root} holds no image: check the path")
    table = next((root / name for name in TABLES if (root / name).exists()), None)
    if table is not None:
        captions = dict(_table(table))
    else:
        files = {name: (root / name).with_suffix(".txt") for name in names}
        captions = {name: file.read_text(encoding="utf-8").strip() for name, file in files.items() if file.exists()}
    missing = [name for name in names if name not in captions]
    if missing:
        where = table.name if table else "a .txt file beside it"
        raise DataError(
            f"{root}: {len(missing)} of {len(names)} images have no caption in {where}, first {missing[0]}: add it, or remove "
            "the image"
        )
    return names, lambda name: (root / name).read_bytes(), [captions[name] for name in names]


def _table(table: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        with explained(f"{table}, line {number} is not JSON", 'write {"file_name": "a.png", "caption": "..."}'):
            row = json.loads(line)
        name = next((row[key] for key in FILE_KEYS if isinstance(row, dict) and key in row), None)
        caption = caption_in(row)
        if not isinstance(name, str) or caption is None:
            raise DataError(f'{table}, line {number}: write {{"file_name": "a.png", "caption": "..."}}')
        yield name, caption


def _tars(paths: Sequence[Path]) -> Found:
    """WebDataset: `KEY.jpg` and `KEY.txt` or `KEY.json` in tar files (the key ends at the first dot of the file's name)."""
    places: dict[str, tuple[int, int, int]] = {}  # name -> file, offset, size
    captions: dict[str, str] = {}
    keys: dict[str, str] = {}
    files = []
    for path in paths:
        with explained(f"{path} cannot be read as a tar file", "make or fetch it again"), tarfile.open(path) as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                key = f"{path.name}/{folder}/{base.partition('.')[0]}"
                if not member.isfile():
                    continue
                if is_image(member.name):
                    name = f"{path.name}/{member.name}"
                    places[name], keys[name] = (len(files), member.offset_data, member.size), key
                elif member.name.endswith((".txt", ".json")):
                    text = archive.extractfile(member).read(2**20).decode("utf-8", "replace")
                    found = caption_in(json.loads(text)) if member.name.endswith(".json") else text.strip()
                    if found is not None:
                        captions.setdefault(key, found)
        files.append(path)
    names = sorted(places)
    if not names:
        raise DataError(f"{paths[0]} holds no image: check the path")
    missing = [name for name in names if keys[name] not in captions]
    if missing:
        raise DataError(f"{missing[0]} has no caption: WebDataset keeps it as {keys[missing[0]]}.txt or .json")
    streams, lock = [path.open("rb") for path in files], threading.Lock()

    def read(name: str) -> bytes:
        file, offset, size = places[name]
        with lock:
            streams[file].seek(offset)
            return streams[file].read(size)

    return names, read, [captions[keys[name]] for name in names]


def _saved_dataset(path: Path) -> Found:
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise DataError(f"{path} is a saved dataset, which needs the package datasets: pip install datasets") from None
    dataset = library.load_from_disk(str(path))
    columns = dataset.column_names
    if isinstance(columns, dict):
        raise DataError(f"{path} holds several splits ({', '.join(columns)}): give the folder of one of them")
    caption = next((key for key in CAPTION_KEYS if key in columns), None)
    if caption is None or "image" not in columns:
        raise DataError(
            f"{path} has columns {', '.join(columns)}: wanted are image and one of {', '.join(CAPTION_KEYS)}"
        )
    pictures = dataset.cast_column("image", library.Image(decode=False))

    def read(name: str) -> bytes:
        row = pictures[int(name)]["image"]
        return row["bytes"] if row["bytes"] is not None else Path(row["path"]).read_bytes()

    return [str(index) for index in range(len(dataset))], read, [str(text) for text in dataset[caption]]
