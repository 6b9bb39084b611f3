"""Logs of a run: two files, and optional services. Knows nothing of models or diffusion.

`stats.jsonl` holds what the training computed and nothing that depends on the clock, so the file of a run that was
killed and resumed equals that of an unbroken one, byte for byte. `times.jsonl` holds the times. Progress and warnings
go to stderr (`console`), results to stdout (`results`).
"""

from __future__ import annotations

import io
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fewstep.system.bounds import TEXT_BYTES, parse_json, regular_file, shown
from fewstep.system.console import Value, console
from fewstep.system.errors import FileError

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Tracker:
    """Writes the lines of one run to `folder`; at most one Tracker per folder.

    Log all lines of a number of images before saving the checkpoint of that number: on resumption, lines after the
    checkpoint are removed.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        resume_from: int | None = None,
        tensorboard: bool = False,
        wandb: str | None = None,
        warn_every: int = 100_000,
        console: Console = console,
    ) -> None:
        """Open the files; remove lines after `resume_from` images and a half-written last line.

        Args:
            resume_from: images of the checkpoint to resume from; None starts a new log and keeps earlier files as
                `*.jsonl.old`.
            tensorboard: also write TensorBoard events to `folder/tensorboard`.
            wandb: also send to this Weights & Biases project; a resumed run continues the same wandb run.
            warn_every: images before the same warning is repeated.
            console: console for warnings.

        Raises:
            ModuleNotFoundError: TensorBoard or wandb is requested and not installed.
            FileError: a line of the files is damaged.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.console = console
        self.warn_every = warn_every
        self._tensorboard = _open_tensorboard(self.folder, resume_from) if tensorboard else None
        self._wandb = _open_wandb(wandb, self.folder, resume_from) if wandb is not None else None
        self._stats = _Lines(self.folder / "stats.jsonl", resume_from)
        self._times = _Lines(self.folder / "times.jsonl", resume_from)
        self._logged: dict[str, int] = {}
        self._warned: dict[str, int] = {}
        for line in self._stats.found:
            if line["kind"] == "warning":
                self._warned[line["code"]] = line["images"]
            else:
                self._logged[line["kind"]] = line["images"]
        earlier = self._times.found[-1]["seconds"] if self._times.found else 0.0
        self._started = time.monotonic() - earlier

    @property
    def seconds(self) -> float:
        """Seconds of this run so far, including earlier parts of a resumed run."""
        return time.monotonic() - self._started

    def log(self, images: int, values: Mapping[str, Value], kind: str = "train") -> None:
        """Append one line to stats.jsonl. Numbers that are not finite are stored as "nan", "inf", "-inf".

        Raises ValueError if `images` is below that of the last line or not above that of the last one of this
        kind, or a value is neither number, string nor None; OSError if the disk is full (no half line stays).
        """
        if images <= self._logged.get(kind, -1):
            raise ValueError(
                f"`images` must be above {self._logged[kind]}, the last {kind} line, got {images}. Try: resume from the run's "
                "checkpoint"
            )
        self._stats.append(images, {"kind": kind, **_checked(values)})
        self._logged[kind] = images
        self._forward(images, kind, values)

    def time(self, images: int, values: Mapping[str, Value]) -> None:
        """Append one line to times.jsonl, with `seconds` since the run's first start.

        Raises as `log`, but any number of lines may have the same `images`.
        """
        self._times.append(images, {"seconds": round(self.seconds, 3), **_checked(values)})
        self._forward(images, "time", values)

    def warn(self, images: int, code: str, text: str) -> bool:
        """Print and log a warning, unless `code` was printed less than `warn_every` images ago.

        Returns whether it was printed.
        """
        last = self._warned.get(code)
        if last is not None and images - last < self.warn_every:
            return False
        self._stats.append(images, {"kind": "warning", "code": code, "text": text})
        self._warned[code] = images
        message = Text.assemble((f"Warning at {images:,} images ({code}): ", "bold yellow"), text)
        self.console.print(message, soft_wrap=True)
        return True

    def image(self, images: int, name: str, png_path: Path | str) -> None:
        """Send a picture to TensorBoard and wandb if they are on. Raises OSError if it cannot be read."""
        if self._tensorboard is not None:
            import numpy
            from PIL import Image

            with Image.open(png_path) as picture:
                pixels = numpy.asarray(picture.convert("RGB"))
            self._tensorboard.add_image(name, pixels, images, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"images": images, name: wandb.Image(str(png_path))})

    def sync(self) -> None:
        """Flush all lines to the disk. Call it before saving a checkpoint, so that both survive a power failure."""
        self._stats.sync()
        self._times.sync()

    def close(self, failed: bool = False) -> None:
        """Close the files; report the end or failure of the run to the services."""
        self._stats.close()
        self._times.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _forward(self, images: int, kind: str, values: Mapping[str, Value]) -> None:
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for name, number in numbers.items():
                self._tensorboard.add_scalar(name, number, images)
        if self._wandb is not None:
            self._wandb.log({"images": images, **numbers})


def read_stats(path: Path | str) -> list[dict[str, Any]]:
    """Read the lines of stats.jsonl or times.jsonl, with "nan", "inf" and "-inf" as numbers.

    An incomplete last line (a run is writing it, or was killed) is omitted.

    Raises FileNotFoundError; FileError, with the line's number, if another line is damaged.
    """
    return [record for record, _ in _parse(Path(path))]


class _Lines:
    """A file of JSON lines whose `images` never decrease; `found` holds the existing lines."""

    def __init__(self, path: Path, resume_from: int | None) -> None:
        self.path = path
        self.found: list[dict[str, Any]] = []
        if path.exists():
            if resume_from is not None:
                end = 0
                for record, size in _parse(path):
                    if record["images"] > resume_from:
                        break
                    self.found.append(record)
                    end += size
                os.truncate(path, end)
            elif path.stat().st_size:
                os.replace(path, path.with_name(f"{path.name}.old"))
        self.images = self.found[-1]["images"] if self.found else 0
        # unbuffered: one write per line, so that a killed run leaves at most half a line
        self._file = io.FileIO(path, "a")

    def append(self, images: int, values: Mapping[str, Value]) -> None:
        if images < self.images:
            raise ValueError(
                f"`images` must be at least {self.images}, the last line of {self.path}, got {images}. Try: resume from the run's "
                "checkpoint"
            )
        line = (json.dumps({"images": images, **values}, allow_nan=False) + "\n").encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            rest = line
            while rest:  # a nearly full disk accepts a part and refuses the next
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)
            problem = f"{error.strerror}; the last line is not logged. Try: make room and run the command again"
            raise OSError(error.errno, problem, str(self.path)) from error
        self.images = images

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _parse(path: Path) -> Iterable[tuple[dict[str, Any], int]]:
    """Iterate over complete lines with their lengths in bytes."""
    with open(regular_file(path), "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(TEXT_BYTES), b""), 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = parse_json(line)
                if not isinstance(record["images"], int):
                    raise TypeError("images is not an integer")
            except (ValueError, LookupError, TypeError) as error:
                raise FileError(
                    f"{path} line {number} is damaged ({shown(str(error), quote=False)}). Try: fix or remove that line"
                ) from error
            yield {key: _restored(value) for key, value in record.items()}, len(line)


def _restored(value: Value) -> Value:
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _checked(values: Mapping[str, Value]) -> dict[str, Value]:
    checked: dict[str, Value] = {}
    for key, value in values.items():
        if key in ("images", "kind", "seconds"):
            raise ValueError(f"{key!r} is reserved by the tracker. Try: another name for {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            value = str(float(value))
        elif value is not None and not isinstance(value, int | float | str):
            raise ValueError(f"{key} is a {type(value).__name__}: log a number (float(...)), a string or None")
        checked[key] = value
    return checked


def _open_tensorboard(folder: Path, resume_from: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise _not_installed("TensorBoard", "tensorboard", error) from error
    purge = None if resume_from is None else resume_from + 1
    return SummaryWriter(str(folder / "tensorboard"), purge_step=purge)


def _open_wandb(project: str, folder: Path, resume_from: int | None) -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise _not_installed("wandb", "wandb", error) from error
    id_file = folder / "wandb-id"
    if resume_from is None or not id_file.exists():
        id_file.write_text(secrets.token_hex(8))
    identity = id_file.read_text()
    run = wandb.init(project=project, dir=str(folder), name=folder.name, id=identity, resume="allow")
    run.define_metric("*", step_metric="images")
    return run


def _not_installed(name: str, extra: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"{name} is not installed ({error}): pip install 'fewstep[{extra}]', or run without it",
        name=error.name,
    )
