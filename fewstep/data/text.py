"""Reader of text files: prompts, captions and the prompts of prepared folders.

Files are UTF-8, with or without a byte order mark. Only a line feed, optionally after a carriage return, ends a line:
`str.splitlines()` splits at ten more characters (U+2028, U+0085, a form feed, ...), which scraped captions contain.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fewstep.data.malformed import Malformed, Tolerance
from fewstep.system.bounds import parse_json, read_file, regular_file, shown
from fewstep.system.console import note
from fewstep.system.errors import DataError

__all__ = [
    "CAPTION_KEYS",
    "CaptionRule",
    "csv_rows",
    "decode",
    "json_lines",
    "lines_of",
    "read_lines",
    "read_text",
    "written_lines",
]

CAPTION_KEYS = ("caption", "text", "prompt")

_MARKS = (  # UTF-32's begin with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip


def decode(data: bytes, where: str, line: int = 1, start: int = 0) -> str:
    """Decode bytes as text, without the byte order mark of Windows programs.

    Args:
        data: a whole file, or a part of one.
        where: the file's name, for messages.
        line: number of the first line.
        start: offset of the first byte in the file.

    Raises:
        Malformed: another encoding; the message names the file, the line and the byte.
    """
    _refuse_marks(data, where)
    try:
        text = data.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise Malformed(
            f"{where}, line {line} must be UTF-8 text, got the byte 0x{data[error.start]:02x} (byte {start + error.start} of the "
            f"file), which is not UTF-8: perhaps it is Windows-1252. Try: {_converted(where, 'WINDOWS-1252')}"
        ) from None
    if "\0" in text:
        line += text.count("\n", 0, text.index("\0"))
        raise Malformed(
            f"{where}, line {line} must be UTF-8 text, got a zero byte, as in UTF-16 without a mark. Try: "
            f"{_converted(where, 'UTF-16LE')}"
        )
    return text


def _refuse_marks(data: bytes, where: str) -> None:
    for mark, kind in _MARKS:
        if data.startswith(mark):
            raise Malformed(f"{where} must be UTF-8 text, got {kind}, not UTF-8. Try: {_converted(where, kind)}")


WRITTEN_BYTES = 1 << 36  # of a file that fewstep wrote: prompts of a billion images
_MOST_LINE = 1 << 24  # bytes of a line


def read_text(path: Path) -> str:
    """Read the text of a file.

    Raises:
        Malformed: another encoding than UTF-8.
    """
    return decode(read_file(path), str(path))


def lines_of(text: str) -> list[str]:
    """Split a text into lines, without line ends; the last line needs none."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_lines(path: Path, bad: Tolerance | None = None) -> Iterator[tuple[int, str]]:
    """Iterate over the lines of a file with their numbers from 1. Blank lines are skipped, and their number is printed.

    Args:
        path: path of the file.
        bad: records lines in another encoding, which are skipped; None: the first is an error.

    Raises:
        DataError: another encoding than UTF-8, or lines that end at carriage returns alone.
    """
    bad, blank, first, place = bad or Tolerance(), 0, 0, 0
    with regular_file(path).open("rb") as file:
        lines = iter(lambda: file.readline(_MOST_LINE), b"")  # a binary file's lines end at line feeds
        for number, raw in enumerate(lines, 1):
            if len(raw) == _MOST_LINE and not raw.endswith(b"\n"):
                raise DataError(f"{path}, line {number} must have fewer than {_MOST_LINE:,} bytes, got more")
            if number == 1:
                _refuse_marks(raw, str(path))  # no line of such a file could be read
                if not raw.endswith(b"\n") and b"\r" in raw.rstrip(b"\r"):
                    raise DataError(
                        f"{path} must end its lines with line feeds, got carriage returns alone, as old Macs write them. Try: "
                        f"tr '\\r' '\\n' < {path} > NEW"
                    )
            line = None
            with bad.item(f"{path}, line {number}"):
                line = decode(raw, str(path), number, place).removesuffix("\n").removesuffix("\r")
                line = line.removeprefix("\ufeff")  # of the second of two files that were put together
            place += len(raw)
            if line is None:
                continue
            if line.strip():
                yield number, line
            else:
                blank, first = blank + 1, first or number
    if blank:
        note(f"{path}: {blank:,} blank line(s) were skipped, the first is line {first}")


def json_lines(path: Path, bad: Tolerance | None = None) -> Iterator[tuple[int, Any]]:
    """Rows of a .jsonl file with the numbers of their lines.

    Args:
        path: of the file.
        bad: as for `read_lines`; also records lines that are not JSON.

    Raises:
        DataError: another encoding, or a line that is not JSON.
    """
    bad = bad or Tolerance()
    for number, line in read_lines(path, bad):
        rows = []
        with bad.item(f"{path}, line {number}"):
            rows.append(_row(line, f"{path}, line {number}"))
        yield from ((number, row) for row in rows)


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Rows of a .csv or .tsv file with a header, by the number of the line that they end on; quoted cells may hold line feeds.

    Raises:
        DataError: another encoding, an empty file, or quotes that do not end.
    """
    rows = csv.DictReader(
        io.StringIO(read_text(path), newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
    )
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise DataError(
            f"{path} cannot be read as {path.suffix} beyond line {rows.line_num} ({error}). Try: write it again with every text in quotes"
        ) from None


def _row(line: str, where: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_once)
    except _RepeatedKey as error:
        raise Malformed(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        why = shown(getattr(error, "msg", str(error)), quote=False)
        raise Malformed(
            f'{where} is not JSON ({why}): write one object a line, such as {{"file_name": "a.png", "caption": "..."}}'
        ) from None


class _RepeatedKey(ValueError):
    """A key that an object of JSON gives twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; a repeated key is an error, where Python would keep the last value."""
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise _RepeatedKey(f"the key {shown(key)} is given twice: keep one of them")
        row[key] = value
    return row


def written_lines(path: Path) -> list[Any]:
    """Values of a .jsonl file that fewstep wrote, one a line.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        text = read_file(path, WRITTEN_BYTES).decode()
        return [parse_json(line) for line in lines_of(text)]
    except (OSError, ValueError) as error:
        why = shown(str(error), quote=False)
        raise DataError(f"{path} cannot be read ({why}): delete its folder and run `fewstep prepare` again") from None


@dataclass(frozen=True)
class CaptionRule:
    """Rule for the caption among a row's texts.

    Attributes:
        column: the key or column that holds it; None: the first of caption, text and prompt that a row has.
        several: what a list of captions gives: an error, its first or its longest.
        missing: what a row without a caption (null or empty) gives: an error, or the row is skipped and counted.
    """

    column: str | None = None
    several: Literal["refuse", "first", "longest"] = "refuse"
    missing: Literal["refuse", "skip"] = "refuse"

    def key(self, keys: Sequence[str]) -> str | None:
        """The key or column of a caption among those there are, None if there is none."""
        wanted = CAPTION_KEYS if self.column is None else (self.column,)
        found = [key for key in wanted if key in keys]
        if len(found) > 1:
            note(
                f"rows have {' and '.join(found)}: captions are read from {found[0]}. Try: --caption-column NAME for another"
            )
        return found[0] if found else None

    def keys(self) -> str:
        """The keys that are looked for, for messages."""
        return ", ".join(CAPTION_KEYS) if self.column is None else self.column

    def in_row(self, row: Any, where: str) -> str | None:
        """The caption of a row of JSON: the row itself if it is text, or what is under the key; None: to be skipped.

        Raises:
            Malformed: no such key.
            DataError: as `of`.
        """
        if isinstance(row, str):
            return self.of(row, where)
        key = self.key(list(row)) if isinstance(row, dict) else None
        if isinstance(row, dict) and None in row:
            raise Malformed(f"{where} has more cells than the header. Try: put texts with commas in quotes")
        if key is None:
            raise Malformed(f"{where} has no text under {self.keys()}. Try: --caption-column NAME")
        return self.of(row[key], where)

    def of(self, value: Any, where: str) -> str | None:
        """A caption from what stands in its place; None: the row is to be skipped.

        Args:
            value: text, null, or a list of texts.
            where: file and row, for messages.

        Raises:
            DataError: no caption, or several, and no rule says which to take.
            Malformed: something else than text.
        """
        if isinstance(value, list | tuple):
            texts = [item for item in value if item is not None]
            if not all(isinstance(item, str) for item in texts):
                raise Malformed(f"{where}: a caption must be text, got the list {_short(value)}")
            if len(texts) > 1 and self.several == "refuse":
                raise DataError(
                    f"{where}: a caption must be one text, got a list of {len(texts)}: {_short(value)}. Try: "
                    "--several-captions first, or longest"
                )
            value = None if not texts else max(texts, key=len) if self.several == "longest" else texts[0]
        if value is None or value != value:  # NaN stands for null in tables of numbers
            if self.missing == "skip":
                return None
            raise DataError(f"{where}: the caption is missing (null). Try: write one, or --missing-captions skip")
        if not isinstance(value, str):
            raise Malformed(f"{where}: a caption must be text, got {_short(value)}")
        if not value.strip():
            if self.missing == "skip":
                return None
            raise DataError(
                f"{where}: this caption is empty, and the empty prompt stands for no condition. Try: write one, or "
                "--missing-captions skip"
            )
        if "\0" in value:
            raise Malformed(f"{where}: the caption holds a zero byte, which no tokenizer reads. Try: write it again")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Malformed(
                f"{where}: the caption holds half a character ({value[error.start]!r} at {error.start}), which no file can "
                "keep. Try: write it again"
            ) from None
        return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _converted(where: str, kind: str) -> str:
    return f"save it as UTF-8 (iconv -f {kind} -t UTF-8 {where.split(', ')[0]} > NEW)"
