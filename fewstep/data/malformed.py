"""Items that cannot be read: a few are omitted, counted and named; too many are an error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.system.errors import DataError
from fewstep.system.files import atomic_write

__all__ = ["Malformed", "Tolerance"]


class Malformed(DataError):
    """One item that cannot be read: damaged, in another encoding, or in another form."""


class Tolerance:
    """Malformed items found so far, up to a tolerated share.

    Args:
        share: tolerated share of all items; 0 raises the first.

    Attributes:
        items: (name, problem) of each, in the order found.
    """

    def __init__(self, share: float = 0.0) -> None:
        if not 0 <= share <= 1:
            raise DataError(f"`max_malformed` must be a share between 0 and 1, got {share:g}. Try: 0.01")
        self.share = share
        self.items: list[tuple[str, str]] = []

    @contextmanager
    def item(self, name: str) -> Iterator[None]:
        """Context that ends early if the item is malformed, and records it.

        Raises:
            Malformed: no share is tolerated.
        """
        try:
            yield
        except Malformed as error:
            if not self.share:
                raise
            self.items.append((name, str(error)))

    def check(self, total: int) -> None:
        """Raise DataError if too many of `total` items are malformed."""
        if len(self.items) > self.share * total:
            raise DataError(
                f"{self.items[0][1]} ({len(self.items):,} of {total:,} items are malformed, more than the share of "
                f"{self.share:g} that may be left out: --max-malformed)"
            )

    def write(self, path: Path) -> None:
        """Write the items to a .jsonl file, one per line; writes no file if there are none."""
        if not self.items:
            path.unlink(missing_ok=True)
            return
        lines = (json.dumps({"item": name, "problem": problem}, ensure_ascii=False) for name, problem in self.items)
        atomic_write(path, "".join(f"{line}\n" for line in lines))
