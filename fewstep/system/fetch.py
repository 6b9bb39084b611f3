"""Known weights of other people: fetched from their own place, kept only if their checksum is right. Knows no network."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fewstep.system.errors import FileError, WriteError

__all__ = ["Known", "fetch"]

CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
SLACK = 1.5  # of the known size: a longer answer is another file


@dataclass(frozen=True)
class Known:
    """Weights with their address.

    Attributes:
        about: what they are for.
        url: their authors' address.
        sha256: sha256 of the file (hex), or its first digits.
        size: of the file in bytes, roughly.
        place: where fewstep looks for it.
    """

    about: str
    url: str
    sha256: str
    size: int
    place: Callable[[], Path]


def fetch(known: Known, url: str | None = None, progress: Callable[[int], None] = lambda done: None) -> bool:
    """Fetch a file to its place; returns False if it was there already.

    Args:
        known: which.
        url: another address of the same file, such as a mirror's; http, https or file.
        progress: called with the bytes read.

    Raises:
        FileError: it cannot be fetched, or has another checksum; then nothing is kept.
        WriteError: it cannot be written.
    """
    place, address = known.place(), url or known.url
    if place.is_file() and _sha256(place).startswith(known.sha256):
        return False
    if not address.startswith(("http://", "https://", "file://")):
        raise FileError(f"`--url` must begin with https://, http:// or file://, got {address}")
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    digest, done = hashlib.sha256(), 0
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            try:
                with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
                    while block := answer.read(CHUNK):
                        done += len(block)
                        if done > SLACK * known.size:
                            raise FileError(
                                f"{address} must be about {known.size:,} bytes, got more. Try: another --url"
                            )
                        digest.update(block)
                        file.write(block)
                        progress(done)
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                reason = getattr(error, "reason", error)
                raise FileError(
                    f"{address} cannot be fetched ({reason}). Try: again, --url MIRROR, or copy the file to {place} yourself"
                ) from None
        if not digest.hexdigest().startswith(known.sha256):
            raise FileError(
                f"{address} must have the sha256 {known.sha256}, got {digest.hexdigest()}; nothing was kept. Try: again, or "
                "another --url"
            )
        part.replace(place)
    except FileError:
        raise
    except OSError as error:
        raise WriteError(
            f"{place} cannot be written ({error.strerror or error}). Try: free space, or $TORCH_HOME"
        ) from None
    finally:
        part.unlink(missing_ok=True)
    return True


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
