"""Structure of an LMDB file, checked before the library maps it into memory.

The library trusts its files: a page beyond the end, as after an interrupted download, ends the process. Layout: LMDB 0.9's
mdb.c (MDB_meta, MDB_page, MDB_node).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from fewstep.system.bounds import regular_file
from fewstep.system.errors import DataError

__all__ = ["check_lmdb"]

PAGE_HEADER, META, DATABASE = 16, "<IIQQ", 48
MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, OVERFLOW, METAPAGE = 1, 2, 4, 8
BIG, NO_PAGE = 1, 2**64 - 1
DEEPEST = 32  # the library's own limit


def check_lmdb(file: Path) -> None:
    """Check that every page that can be reached lies in the file, and every record in its page.

    Reads branch and leaf pages, not the records on pages of their own.

    Raises:
        DataError: the file is truncated, damaged or of another format.
        OSError: it cannot be read.
    """
    regular_file(file)
    size = file.stat().st_size
    if size < 2 * PAGE_HEADER + 2 * 136:
        raise _damaged(file, f"it has {size:,} bytes")
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Pages(file, data).check()


def _damaged(file: Path, why: str) -> DataError:
    return DataError(f"{file} must be a whole LMDB file, got a damaged one ({why}). Try: make or fetch it again")


class _Pages:
    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data = file, data
        magic, version, _, _ = struct.unpack_from(META, data, PAGE_HEADER)
        self.size = struct.unpack_from("<I", data, PAGE_HEADER + 24)[0]
        if magic != MAGIC or version != VERSION:
            raise _damaged(file, "it does not begin as one")
        if self.size not in (1 << bits for bits in range(8, 17)) or len(data) < 2 * self.size:
            raise _damaged(file, f"it says pages of {self.size:,} bytes")
        metas = [self._meta(number) for number in (0, 1)]
        _, self.last, self.depth, self.root = max(metas)
        self.pages = len(data) // self.size
        self.seen: set[int] = set()

    def _meta(self, number: int) -> tuple[int, int, int, int]:
        start = number * self.size + PAGE_HEADER
        magic, version, _, _ = struct.unpack_from(META, self.data, start)
        flags = struct.unpack_from("<H", self.data, number * self.size + 10)[0]
        if magic != MAGIC or version != VERSION or not flags & METAPAGE:
            raise _damaged(self.file, f"its page {number} is no description")
        main = start + 24 + DATABASE
        kinds, depth = struct.unpack_from("<HH", self.data, main + 4)
        root = struct.unpack_from("<Q", self.data, main + 40)[0]
        last, transaction = struct.unpack_from("<QQ", self.data, main + DATABASE)
        if kinds:
            raise _damaged(self.file, f"its table is of another kind ({kinds})")
        if struct.unpack_from("<I", self.data, start + 24)[0] != self.size:
            raise _damaged(self.file, "its two descriptions differ")
        return transaction, last, depth, root

    def check(self) -> None:
        if self.root == NO_PAGE:
            return
        if not 0 < self.depth <= DEEPEST:
            raise _damaged(self.file, f"its tree is {self.depth} pages deep")
        level = [self.root]
        for depth in range(self.depth):
            level = [page for number in level for page in self._below(number, leaf=depth == self.depth - 1)]

    def _below(self, number: int, *, leaf: bool) -> Iterator[int]:
        """Numbers of the pages below a branch page, after its checks; a leaf page has none."""
        self._check_present(number, 1)
        if number in self.seen:
            raise _damaged(self.file, f"it refers twice to page {number:,}")
        self.seen.add(number)
        start = number * self.size
        own, _, flags, lower, upper = struct.unpack_from("<QHHHH", self.data, start)
        if own != number or flags & 15 != (LEAF if leaf else BRANCH) or flags & ~0x4017:
            raise _damaged(self.file, f"its page {number:,} is of another kind")
        if not PAGE_HEADER <= lower <= upper <= self.size or (lower - PAGE_HEADER) % 2 or lower == PAGE_HEADER:
            raise _damaged(self.file, f"its page {number:,} has no valid bounds")
        count = (lower - PAGE_HEADER) // 2
        if not leaf and count < 2:
            raise _damaged(self.file, f"its page {number:,} has one way down")
        for place in struct.unpack_from(f"<{count}H", self.data, start + PAGE_HEADER):
            if not upper <= place <= self.size - 8:
                raise _damaged(self.file, f"its page {number:,} has a record outside of itself")
            low, high, kind, key = struct.unpack_from("<HHHH", self.data, start + place)
            length, stored = low | high << 16, place + 8 + key
            if not leaf:
                if stored > self.size:
                    raise _damaged(self.file, f"its page {number:,} has a key outside of itself")
                yield length | kind << 32
                continue
            if kind & ~BIG or key == 0 or stored + (8 if kind else length) > self.size:
                raise _damaged(self.file, f"its page {number:,} has a record outside of itself")
            if kind:
                self._check_present(
                    struct.unpack_from("<Q", self.data, start + stored)[0], -(-(PAGE_HEADER + length) // self.size)
                )

    def _check_present(self, number: int, pages: int) -> None:
        """Check that so many pages from `number` lie in the file; unused pages at its end need not."""
        if not number >= 2 or number + pages > self.last + 1:
            raise _damaged(self.file, f"it refers to page {number + pages - 1:,} of {self.last + 1:,}")
        if number + pages > self.pages:
            needed = (self.last + 1) * self.size
            raise _damaged(
                self.file, f"it has {self.pages * self.size:,} of {needed:,} bytes, as after an interrupted download"
            )
