"""Atomic writes of files and folders, and the lock of a run folder."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import socket
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import filelock

from fewstep.system.errors import FileError, WriteError
from fewstep.system.interrupt import uninterrupted

TEMPORARY = ".tmp-"


class RunLock:
    """Lock of a run folder for one process: `with RunLock(folder): ...`. The system releases it when the process ends.

    Entering raises FileError if the folder is taken, WriteError if it cannot be written to or locked.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder) / "lock"
        self.holder = Path(folder) / "lock-holder"  # a separate file: on Windows a locked file cannot be read
        self._lock = filelock.FileLock(self.path)

    def __enter__(self) -> RunLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
            self.holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        except filelock.Timeout:
            holder = self.holder.read_text(encoding="utf-8").strip() if self.holder.exists() else ""
            raise FileError(
                f"{self.path.parent} is in use by {holder or 'another process'}. Try: wait for that run, stop it, or use another "
                "folder"
            ) from None
        except (OSError, NotImplementedError) as error:  # the second: a file system without locks
            self._lock.release()
            problem = error if isinstance(error, OSError) else OSError(errno.ENOLCK, str(error))
            raise write_error(problem, self.path, 0, "Nothing was changed") from error
        return self

    def __exit__(self, *_: object) -> None:
        self.holder.unlink(missing_ok=True)
        self._lock.release()


def cache_folder() -> Path:
    """Cache folder of fewstep: `$FEWSTEP_CACHE`, by default ~/.cache/fewstep."""
    return Path(os.environ.get("FEWSTEP_CACHE") or "~/.cache/fewstep").expanduser()


def atomic_write(path: Path | str, data: bytes | str, *, sync: bool = True) -> None:
    """Write a file atomically: whenever the process dies, `path` holds either its old content or all of `data`.

    Without `sync` this does not cover power failures, but is ten times as fast (used for pictures).

    Raises WriteError if the disk is full, the folder is missing or cannot be written to.
    """
    write_atomically({Path(path): data.encode() if isinstance(data, str) else data}, sync)


def replace_folder(folder: Path, target: Path) -> None:
    """Replace `target` by a folder written next to it; signals wait until it is done."""
    doomed = target.with_name(f"{TEMPORARY}{target.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    with uninterrupted():
        if target.exists():
            os.rename(target, doomed)
        os.rename(folder, target)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, names: Collection[str]) -> None:
    """Remove unfinished writes of these files and folders by a killed process; no process may be writing them."""
    for name in names:
        for entry in folder.glob(f"{TEMPORARY}{name}*"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


def remove_abandoned(path: Path) -> None:
    """Remove unfinished writes of a file by processes of this machine that are gone."""
    for entry in path.parent.glob(f"{TEMPORARY}{glob.escape(path.name)}-*"):
        writer = entry.name.rpartition("-")[2]
        if writer.isdecimal() and not _lives(int(writer)):
            entry.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    if sys.platform == "win32":  # there is no harmless signal there
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_synced(path: Path, data: bytes, sync: bool = True) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    if sys.platform == "win32":  # it cannot open folders; its file system logs renames
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(files: Mapping[Path, bytes], sync: bool = True) -> None:
    temporary = {path: path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}") for path in files}
    for path in files if sync else ():  # not for each of thousands of pictures in a folder
        remove_abandoned(path)
    try:
        for path, data in files.items():
            write_synced(temporary[path], data, sync)
        with uninterrupted():  # weights and their JSON change together
            for path in files:
                os.replace(temporary[path], path)
        for folder in {path.parent for path in files} if sync else ():
            sync_folder(folder)
    except BaseException as error:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)
        if isinstance(error, OSError):
            needed = sum(map(len, files.values()))
            raise write_error(error, next(iter(files)), needed, "The previous content is intact") from error
        raise


def write_error(error: OSError, target: Path, needed: int, kept: str) -> WriteError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = next(folder for folder in target.absolute().parents if folder.exists())
        free = shutil.disk_usage(place).free
        way_out = f"{needed:,} bytes are needed, {place} has {free:,} free. Try: make room and run the command again"
    else:
        way_out = f"check that {target.parent} exists and can be written to"
    explained = WriteError(f"cannot write {target} ({error.strerror or error}): {way_out}. {kept}.")
    explained.errno = error.errno
    return explained


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
