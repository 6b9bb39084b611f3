"""Output folders of commands: new, empty, or of the same kind. Never a folder with the user's own files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fewstep.system.bounds import read_json
from fewstep.system.errors import FileError
from fewstep.system.files import atomic_write

__all__ = ["MARKER", "check_out", "marker", "write_marker"]

Kind = Literal["run", "pairs", "prepared", "export", "samples", "import"]

MARKER_BYTES = 1 << 20
MARKER = "fewstep.json"  # kind of a folder whose files have other programs' names
WORDS: dict[Kind, str] = {
    "run": "a run",
    "pairs": "pairs of a teacher",
    "prepared": "prepared prompts",
    "export": "an exported student",
    "samples": "samples",
    "import": "an imported model",
}
# the first file of each kind of folder, by which an interrupted command recognises it
MARKS: dict[Kind, tuple[str, ...]] = {
    "run": ("run.yaml", "lock", "stats.jsonl", "checkpoints"),
    "pairs": ("pairs.json",),
    "prepared": ("prompts.json", "null.safetensors"),
    "import": ("student.json", "teacher.json"),
}


def check_out(folder: Path, kind: Kind) -> None:
    """Refuse a folder that holds anything but `kind`, or that is not writable. Creates nothing.

    Hidden files, such as those of desktops, are ignored.

    Raises:
        FileError: it is a file, lies below one, holds other files, or is not writable.
    """
    folder = Path(folder)
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        below = "" if place == folder.absolute() else f", so {folder} cannot be made"
        raise FileError(f"`--out` must be a folder, got the file {place}{below}. Try: another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise FileError(
            f"`--out` must be writable, got {folder} in {place}. Try: another --out, or change its permissions"
        )
    names = sorted(name for name in os.listdir(place) if not name.startswith(".")) if folder.exists() else []
    found = _kind(folder) if names else kind
    if found == kind:
        return
    what = WORDS[found] if found else f"other files ({', '.join(names[:3])}{', ...' if names[3:] else ''})"
    raise FileError(
        f"`--out` {folder} must be new, empty, or hold {WORDS[kind]}, got {what}; nothing was written. Try: another --out"
    )


def _kind(folder: Path) -> Kind | None:
    """Kind of a folder's content."""
    own = marker(folder).get("kind")
    if isinstance(own, str) and own in WORDS:
        return own
    return next((kind for kind, names in MARKS.items() if any((folder / name).exists() for name in names)), None)


def marker(folder: Path) -> dict[str, Any]:
    """Read a folder's marker; empty if there is none."""
    try:
        found = read_json(Path(folder) / MARKER, MARKER_BYTES)
    except (OSError, ValueError):  # no marker, or another program's file of that name
        return {}
    return found if isinstance(found, dict) else {}


def write_marker(folder: Path, kind: Kind, about: Mapping[str, Any] = {}) -> None:
    """Mark a folder as `kind`, before writing anything else.

    Raises:
        WriteError: it cannot be written.
    """
    atomic_write(Path(folder) / MARKER, json.dumps({"kind": kind, **about}, indent=2) + "\n")
