"""Sentences that a user should read although the work continues: each once a command, on stderr, from the first process."""

from __future__ import annotations

import os
import sys
from functools import cache

__all__ = ["note"]


@cache
def note(message: str) -> None:
    """Print a sentence on stderr. The same sentence is printed once; `note.cache_clear()` begins anew."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {message}", file=sys.stderr)
