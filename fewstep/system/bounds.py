"""Bounds on files from others: their kind, size, nesting and number of parts, and how much of them a message repeats.

A small file may claim or multiply much: every reader of foreign files takes its limits from here. They are generous, and
only keep one file from taking all memory or all time.
"""

from __future__ import annotations

import json
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.system.errors import FileError, UserError, printable

__all__ = ["parse_json", "printable", "read_file", "read_json", "reading", "regular_file", "shown"]

QUOTED = 200  # characters of foreign text in a message
TEXT_BYTES = 1 << 19  # of a run file
JSON_BYTES = 1 << 28  # of a JSON file: labels of millions of images
NODES = 50_000  # values in a run file, aliases counted wherever they are used
DEPTH = 100  # nesting of YAML and JSON
UNPACKED = (
    32  # times its packed size that an archive member may have, beyond `UNPACKED_FREE`: zeros pack a thousandfold
)
UNPACKED_FREE = 1 << 26
PIXELS = 1 << 26  # of one picture: 8192 x 8192
SAMPLE_NUMBERS = 1 << 28  # of one sample of a network


def regular_file(path: Path | str) -> Path:
    """Return the path of a file or folder; refuse pipes, sockets and devices, which may never end.

    Raises:
        FileError: it is one of these.
        OSError: it does not exist, or cannot be looked at.
    """
    path = Path(path)
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise FileError(f"{shown_path(path)} must be a file, got a pipe, a socket or a device. Try: copy it to a file")
    return path


def read_file(path: Path | str, most: int = JSON_BYTES) -> bytes:
    """Read a whole regular file of at most `most` bytes.

    Raises:
        FileError: it is larger, or no file.
        OSError: it cannot be read.
    """
    path = regular_file(path)
    with open(path, "rb") as file:
        # a read takes as much memory as it asks for, so ask for no more than there should be
        content = file.read(min(path.stat().st_size, most) + 1)
        if content and len(content) <= most and (rest := file.read(1)):  # it grew, or belongs to the system
            content += rest + file.read(most - len(content))
    if len(content) > most:
        raise FileError(f"{shown_path(path)} must have at most {most:,} bytes, got {path.stat().st_size:,}")
    return content


def parse_json(content: bytes | str) -> Any:
    """Decode JSON of bounded nesting.

    Raises:
        ValueError: not JSON, not UTF-8, or too deep.
    """
    try:
        value = json.loads(content)
        _check_depth(value)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEPTH} levels") from None
    except ValueError as error:  # its sub-classes have other constructors
        raise ValueError(shown(str(error), quote=False)) from None
    return value


def read_json(path: Path | str, most: int = JSON_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        FileError: not JSON, too deep, too large, or no file.
        OSError: it cannot be read.
    """
    try:
        return parse_json(read_file(path, most))
    except UserError:
        raise
    except ValueError as error:
        raise FileError(f"{shown_path(path)} must be a JSON file, got one that cannot be decoded ({error})") from None


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [
            item
            for part in level
            if isinstance(part, dict | list)
            for item in (part.values() if isinstance(part, dict) else part)
            if isinstance(item, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {DEPTH} levels")


@contextmanager
def reading(path: Path | str, kind: type[UserError] = FileError) -> Iterator[None]:
    """Context of a foreign file's decoding: whatever a decoder raises becomes an error that names the file.

    Errors that explain themselves pass, and so do those of the system that name a file.

    Raises:
        UserError: of the given kind.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise kind(f"{shown_path(path)} cannot be read ({error.strerror or error}). Try: fetch it again") from None
    except MemoryError:
        raise kind(f"{shown_path(path)} claims more memory than there is. Try: fetch it again") from None
    except Exception as error:
        why = shown(" ".join(str(error).split()), quote=False)
        raise kind(
            f"{shown_path(path)} cannot be read ({type(error).__name__}: {why}): it is damaged, or of another kind. "
            "Try: fetch it again and compare its checksum"
        ) from error


class _Brief(reprlib.Repr):
    """A `repr` of bounded length and time, whatever a value contains."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, QUOTED, QUOTED
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 8
        self.maxlong = 60

    def repr_dict(self, x: Any, level: int) -> str:
        """Keep the order of the keys, as `repr` does."""
        if level <= 0:
            return "{...}" if x else "{}"
        parts = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key in list(x)[: self.maxdict]]
        return "{" + ", ".join(parts + ["..."] * (len(x) > self.maxdict)) + "}"

    def repr_int(self, x: int, level: int) -> str:
        """Abbreviate numbers that Python refuses to write."""
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"an integer of {x.bit_length():,} bits"


_BRIEF = _Brief()


def shown(value: Any, *, quote: bool = True) -> str:
    """Return a foreign value for a message: at most `QUOTED` printable characters, with escapes shown escaped.

    Args:
        value: any value.
        quote: whether text gets quotes, as by `repr`.
    """
    text = printable(value[: QUOTED + 1]) if isinstance(value, str) and not quote else _BRIEF.repr(value)
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


def shown_path(path: Path | str) -> str:
    return printable(str(path))
