"""Random changes of valid files of every format that fewstep reads, and the workers that give them to its readers.

A change may be blind (bytes) or know the format: values of JSON and YAML, members of archives whose checksums then fit again,
chunks of pictures, instructions of pickles, headers of safetensors. Where a second file holds checksums of the first, half of
the changes mend it, else the reader would stop there. `tools/fuzz.py` runs many of them, `test_mutants.py` a few.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import mmap
import os
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fewstep.system.errors import MESSAGE, UserError

SECONDS, WALL, BYTES = 10, 60, 2 * 2**30
"""Limits of one mutant: processor time, time on the wall, memory beyond the parent's."""
PER_WORKER = 250  # mutants that share a process

# -- blind changes ---------------------------------------------------------------------------------------------------

TOKENS = (
    b"null", b"[]", b"{}", b"-1", b"0", b"1e999", b"NaN", b"9" * 40, b'"', b"\\", b"[" * 40, b"&a", b"*a", b"<<: *a", b"!!python/name:os.system",
    b"\x00", b"\xff" * 8, b"\x80", b"\n", b": ", b"- ", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"../", b"/dev/zero", b"%n", b"\x1b[31m",
)  # fmt: skip
INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def blind(content: bytes, draw: random.Random, places: list[int] | None = None) -> bytes:
    """Change one to eight places."""
    out = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        size = len(out)
        at = draw.choice(places) % (size + 1) if places and draw.random() < 0.7 else draw.randrange(size + 1)
        match draw.randrange(10):
            case 0 if at < size:
                out[at] ^= 1 << draw.randrange(8)
            case 1 if at < size:
                out[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
            case 2:
                width = draw.choice((2, 4, 8))
                number = draw.choice(INTEGERS) & (2 ** (8 * width) - 1)
                out[at : at + width] = number.to_bytes(width, draw.choice(("little", "big")))
            case 3:
                del out[at : at + draw.choice((1, 2, 8, 64, size // 4 + 1))]
            case 4:
                other, length = draw.randrange(size + 1), draw.choice((1, 4, 16, 256))
                out[at:at] = out[other : other + length]
            case 5:
                out[at:at] = draw.choice(TOKENS)
            case 6:
                out[at:at] = draw.randbytes(draw.choice((1, 3, 17)))
            case 7:
                del out[at:]
            case 8:
                out[at:at] = out[at : at + draw.choice((1, 8, 64))] * draw.choice((2, 50, 500))
            case 9:
                numbers = list(re.finditer(rb"\d+", bytes(out[:1_000_000])))
                if numbers:
                    found = draw.choice(numbers)
                    out[found.start() : found.end()] = draw.choice((b"0", b"-1", b"1e9", b"9999999999", b"x", b"1.5"))
    return bytes(out)


# -- changes that know the format --------------------------------------------------------------------------------------


def _values(draw: random.Random) -> Any:
    deep: Any = 1
    for _ in range(60):
        deep = [deep]
    return draw.choice(
        (None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 1e308, 1e-320, math.nan, math.inf, -math.inf, 0.5, "", "x", "cuda", "nan",
         "../../etc/passwd", "/dev/zero", "\x1b[31m\x07", "\ud800", "é" * 3000, "9" * 5000, [], {}, [1], [None], ["x"], [1, [2]], {"a": 1}, {"kind": "none"},
         [0] * 3000, deep, [{}], "x" * 100_000)
    )  # fmt: skip


def _slots(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        part = stack.pop()
        keys = part.keys() if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        for key in list(keys):
            found.append((part, key))
            stack.append(part[key])
    return found


def changed(value: Any, draw: random.Random) -> Any:
    """Change one to three values of a tree in place; returns it, or another value in its stead."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        slots = _slots(value)
        if not slots or draw.random() < 0.02:
            return _values(draw)
        part, key = draw.choice(slots)
        match draw.randrange(5):
            case 0:
                del part[key]
            case 1 if isinstance(part, dict):
                part[draw.choice(("x", "", "kind", "\x1b[2J", "class_name", "0"))] = part.pop(key)
            case 2:
                part[key] = draw.choice(slots)[0]  # an ancestor makes a circle, which no file can hold
                try:
                    json.dumps(value)
                except (ValueError, RecursionError):
                    part[key] = None
            case _:
                part[key] = _values(draw)
    return value


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def json_change(content: bytes, draw: random.Random) -> bytes:
    return _dumped(changed(json.loads(content), draw))


def lines_change(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines()
    at = draw.randrange(len(lines))
    lines[at] = json_change(lines[at], draw)
    return b"\n".join(lines) + b"\n"


def yaml_change(content: bytes, draw: random.Random) -> bytes:
    try:
        return yaml.safe_dump(changed(yaml.safe_load(content), draw)).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return content[: len(content) // 2]


def header_change(content: bytes, draw: random.Random) -> bytes:
    """The JSON header of a .safetensors file, with its length corrected."""
    size = int.from_bytes(content[:8], "little")
    head = content[8 : 8 + size]
    head = json_change(head, draw) if draw.random() < 0.7 else blind(head, draw)
    return struct.pack("<Q", len(head)) + head + content[8 + size :]


def numbers_change(content: bytes, draw: random.Random) -> bytes:
    """A weight of a .safetensors file becomes NaN, infinite, or very large."""
    out, start = bytearray(content), 8 + int.from_bytes(content[:8], "little")
    if len(out) - start < 4:
        return blind(content, draw)
    at = start + draw.randrange((len(out) - start) // 4) * 4
    out[at : at + 4] = draw.choice(
        (struct.pack("<f", draw.choice((math.nan, math.inf, 3e38, -1e30))), b"\xff\xff\xff\x7f")
    )
    return bytes(out)


def zip_change(content: bytes, draw: random.Random) -> bytes:
    """Members of a zip file, whose checksums fit again."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        packed = archive.infolist()[0].compress_type
    at = draw.randrange(len(members))
    name, blob = members[at]
    match draw.randrange(6):
        case 0:
            del members[at]
        case 1:
            members[at] = draw.choice(("../x.png", "x", "/etc/passwd", name + "/", "a\x1b[31m.png", name.upper())), blob
        case 2:
            members.append(members[at])
        case _:
            members[at] = name, aware(Path(name).suffix, draw)(blob, draw)
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", packed) as archive:
        warnings.simplefilter("ignore")
        for name, blob in members:
            archive.writestr(name, blob)
    return out.getvalue()


def tar_change(content: bytes, draw: random.Random) -> bytes:
    """Members of a tar file, with headers that fit again."""
    packed = content[:2] == b"\x1f\x8b"
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = [(info, archive.extractfile(info)) for info in archive]
        read = [(info, blob.read() if blob else b"") for info, blob in members]
    at = draw.randrange(len(read))
    with tarfile.open(fileobj=out, mode="w:gz" if packed else "w") as archive:
        for number, (info, blob) in enumerate(read):
            if number == at:
                match draw.randrange(5):
                    case 0:
                        info.name = draw.choice(("../x.png", "/etc/x.png", "a\x1b[31m.png", "x" * 300, "0.png", "x"))
                    case 1:
                        info.type, info.linkname = (
                            draw.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)),
                            draw.choice(("/dev/zero", info.name, "0.png")),
                        )
                    case 2:
                        info.type = draw.choice((tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"Z"))
                    case _:
                        blob = aware(Path(info.name).suffix, draw)(blob, draw)
            info.size = len(blob)
            archive.addfile(info, io.BytesIO(blob))
    return out.getvalue()


def gzip_change(content: bytes, draw: random.Random) -> bytes:
    return gzip.compress(blind(gzip.decompress(content), draw), 1)


def png_change(content: bytes, draw: random.Random) -> bytes:
    """A chunk of a PNG file, whose checksum fits again."""
    chunks, at = [], 8
    while at + 8 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return blind(content, draw)
    which = draw.randrange(len(chunks))
    kind, data = chunks[which]
    match draw.randrange(4):
        case 0:
            chunks.insert(which, chunks[draw.randrange(len(chunks))])
        case 1:
            kind = draw.choice(
                (b"IHDR", b"PLTE", b"tRNS", b"iTXt", b"zTXt", b"iCCP", b"acTL", b"fcTL", b"eXIf", b"IEND", b"gAMA")
            )
            chunks.insert(
                which, (kind, draw.choice((b"", data, b"x\0\0" + zlib.compress(bytes(100_000)), draw.randbytes(13))))
            )
        case _:
            chunks[which] = kind, blind(data, draw)
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return content[:8] + body


OPCODES = [code.code.encode("latin1") for code in pickletools.opcodes]


def pickle_change(content: bytes, draw: random.Random) -> bytes:
    """Instructions of a pickle: other ones, fewer, more."""
    try:
        places = [at for _, _, at in pickletools.genops(content) if at is not None]
    except Exception:  # whatever the standard library finds odd in a mutant's part
        return blind(content, draw)
    if draw.random() < 0.5 or len(places) < 3:
        return blind(content, draw, places)
    out = bytearray(content)
    for _ in range(draw.choice((1, 2, 4))):
        at = draw.randrange(len(places) - 1)
        first, last = places[at], places[at + 1]
        match draw.randrange(4):
            case 0:
                out[first : first + 1] = draw.choice(OPCODES)
            case 1:
                out[first:first] = draw.choice(OPCODES) + draw.choice(
                    (b"", b"\x00", b"\xff\xff\xff\x7f", b"os\nsystem\n")
                )
            case 2:
                out[first:first] = out[first:last] * draw.choice((1, 2, 100))
            case 3:
                del out[first:last]
        places = [place for place in places if place < first] or places
        if len(places) < 3:
            break
    return bytes(out)


AWARE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": json_change, ".jsonl": lines_change, ".yaml": yaml_change, ".safetensors": header_change, ".zip": zip_change, ".npz": zip_change,
    ".bin": zip_change, ".tar": tar_change, ".gz": gzip_change, ".png": png_change, ".pkl": pickle_change,
}  # fmt: skip


def aware(suffix: str, draw: random.Random) -> Callable[[bytes, random.Random], bytes]:
    """A change for files of a suffix: one that knows the format, or a blind one."""
    return AWARE[suffix] if suffix in AWARE and draw.random() < 0.6 else blind


def mutate(path: Path, content: bytes, draw: random.Random) -> bytes:
    suffix = path.suffix
    change = aware(suffix, draw)
    if suffix == ".safetensors" and draw.random() < 0.2:
        change = numbers_change
    try:
        return change(content, draw)
    except (
        zipfile.BadZipFile,
        ValueError,
        LookupError,
        struct.error,
        OSError,
        EOFError,
        zlib.error,
        NotImplementedError,
    ):
        return blind(content, draw)  # a part of an archive that is not what its name says


# -- what is changed, and what reads it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """Files of one format.

    Attributes:
        make: writes valid ones into a folder.
        reader: called once, returns what reads the folder.
        files: pattern of the files that are changed.
        mend: makes second files agree with a changed one.
    """

    make: Callable[[Path], None]
    reader: Callable[[], Callable[[Path], object]]
    files: str = "*"
    mend: Callable[[Path], None] | None = None
    whole: bool = True


@dataclass
class Tally:
    """What became of a format's mutants."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0
    memory: int = 0


def fault_of(said: str, place: Path) -> str:
    """What is wrong with a message; empty for nothing."""
    names = [place.name, *(file.name for file in place.rglob("*"))]
    if not any(name in said for name in names):
        return f"the message does not name the file: {said[:300]}"
    if len(said) > MESSAGE + 50:
        return f"a message of {len(said)} characters"
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", said):
        return f"control characters: {said[:300]!r}"
    return ""


def _attempt(read: Callable[[Path], object], place: Path) -> tuple[str, str]:
    try:
        read(place)
    except UserError as error:
        said = fault_of(str(error), place)
        return ("refused", "") if not said else ("fault", said)
    except OSError as error:
        return ("refused", "") if error.filename is not None else ("fault", f"OSError without a file: {error}")
    except MemoryError:
        return "fault", "MemoryError"
    except BaseException as error:
        import traceback

        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "fewstep/fewstep" in frame.filename or "/fewstep/" in frame.filename]
        last = own[-1] if own else frames[-1]
        return (
            "fault",
            f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno} {last.name}: {str(error)[:200]}",
        )
    return "read", ""


def _worker(
    subject: Subject,
    read: Any,
    valid: dict[str, bytes],
    root: Path,
    name: str,
    seed: int,
    numbers: range,
    at: mmap.mmap,
    out: int,
    base: int,
) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    resource.setrlimit(resource.RLIMIT_DATA, (base + BYTES, base + BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL), signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with os.fdopen(out, "w") as answers:
        for number in numbers:
            at[:8] = struct.pack("<q", number)
            place = write_mutant(subject, valid, root, name, seed, number)
            signal.setitimer(signal.ITIMER_PROF, SECONDS), signal.alarm(WALL)
            began = time.process_time()
            kind, said = _attempt(read, place)
            spent = time.process_time() - began
            signal.setitimer(signal.ITIMER_PROF, 0), signal.alarm(0)
            print(json.dumps([number, kind, said, round(spent, 3)]), file=answers, flush=True)
            shutil.rmtree(place, ignore_errors=True)


def write_mutant(subject: Subject, valid: dict[str, bytes], root: Path, name: str, seed: int, number: int) -> Path:
    """Write the mutant of a number into a folder of its own; equal for equal seeds."""
    draw = random.Random(f"{name} {seed} {number}")
    place = root / f"mutant-{number}"
    files = sorted(file for file in valid if Path(file).match(subject.files))
    chosen = draw.choice(files)
    for file, content in valid.items():
        (place / file).parent.mkdir(parents=True, exist_ok=True)
        (place / file).write_bytes(mutate(Path(file), content, draw) if file == chosen else content)
    if subject.mend and draw.random() < 0.6:
        # where the changed file is the one with the checksums, there may be none to mend
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, OSError):
            subject.mend(place)
    return place


def _data_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    return int(line.split()[1]) * 1024


def fuzz(name: str, subject: Subject, count: int, seed: int, root: Path, first: int = 0) -> Tally:
    """Give mutants of a format to its reader, in workers of bounded time and memory.

    Raises:
        UserError: the valid files are refused.
    """
    valid_place = root / f"valid-{name}"
    valid_place.mkdir(parents=True)
    subject.make(valid_place)
    read = subject.reader()
    if subject.whole:
        read(valid_place)
    valid = {
        str(file.relative_to(valid_place)): file.read_bytes()
        for file in sorted(valid_place.rglob("*"))
        if file.is_file()
    }
    tally, base = Tally(), _data_bytes()
    at = mmap.mmap(-1, 8)
    start, end = first, first + count
    while start < end:
        numbers = range(start, min(start + PER_WORKER, end))
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(ours)
                _worker(subject, read, valid, root, name, seed, numbers, at, theirs, base)
            finally:
                os._exit(0)
        os.close(theirs)
        seen = start - 1
        with os.fdopen(ours) as answers:
            for line in answers:
                seen, kind, said, spent = json.loads(line)
                _note(tally, kind, said, seen)
                tally.slowest = max(tally.slowest, spent)
        _, status, used = os.wait4(child, 0)
        tally.memory = max(tally.memory, used.ru_maxrss * 1024)
        start = seen + 1
        if start <= numbers[-1]:  # it died
            (dead,) = struct.unpack("<q", at[:8])
            code = os.waitstatus_to_exitcode(status)
            _note(tally, "fault", f"killed: {signal.Signals(-code).name if code < 0 else code}", dead)
            start = dead + 1
    shutil.rmtree(valid_place)
    return tally


def _note(tally: Tally, kind: str, said: str, number: int) -> None:
    tally.counts[kind] += 1
    if kind == "fault":
        same = re.sub(r"\d+", "N", said.partition("mutant-")[0]) if " at " not in said else said.partition(": ")[0]
        tally.faults.setdefault(same, f"mutant {number}: {said}")
        tally.counts[f"fault: {same}"] += 1


def scratch() -> Iterator[Path]:
    """A folder in memory where there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)
