"""Read a run folder: settings, logs, results, pictures. Absent entries are empty, damaged ones are named.

Used by everything that reads runs from outside. Does not import torch, so that reading is fast.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from fewstep.evaluation.metrics import MEASURES, Column, deciding, number
from fewstep.system.bounds import PIXELS, TEXT_BYTES, read_file, read_json, regular_file, shown
from fewstep.system.errors import FileError
from fewstep.system.strict_yaml import read_yaml
from fewstep.system.tracking import read_stats

__all__ = ["RunFolder", "dig", "is_teacher", "teacher_row"]


class RunFolder:
    """One run folder. Absent entries are empty; unreadable ones are empty and named in `problems`.

    Args:
        folder: the folder, of `fewstep distill` or `fewstep pretrain`.
        label: the run's name among others.
        look: the run's index among others, for colour, dash and marker of its lines.

    Raises:
        FileError: it does not exist, is empty, or is not a run folder.
    """

    def __init__(self, folder: Path, label: str, look: int) -> None:
        self.folder, self.label, self.look = folder, label, look
        self.problems: list[str] = []
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise FileError(f"FOLDER must be a run folder, got {folder}, which {what}. Try: runs/demo")
        if not any(folder.iterdir()):
            raise FileError(f"{folder} is empty. Try: start a run in it (`fewstep distill RECIPE --out {folder}`)")
        if not any((folder / name).exists() for name in ("run.yaml", "stats.jsonl", "results.json")):
            raise FileError(
                f"{folder} is not a run folder (no run.yaml, stats.jsonl or results.json in it). Try: the --out folder of "
                "`fewstep distill` or `fewstep pretrain`"
            )
        self.settings_text = self._read("run.yaml", _text, "")
        self.settings = self._read("run.yaml", lambda path: read_yaml(_text(path)), {})
        self.stats = self._read("stats.jsonl", read_stats, [])
        self.times = self._read("times.jsonl", read_stats, [])
        self.results = self._read("results.json", read_json, {})
        self.pretraining = self.get("kind") == "pretrain"
        file = folder / f"{'teacher' if self.pretraining else 'student'}.safetensors"
        self.file = file if file.exists() else None
        self.header = self._read(f"{file.stem}.json", read_json, {})
        self.problems = list(dict.fromkeys(self.problems))

    def _read(self, name: str, read: Callable[[Path], Any], absent: Any) -> Any:
        path = self.folder / name
        if not path.exists():
            return absent
        try:
            value = read(path)
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.problems.append(f"{name} cannot be read and is omitted: {shown(str(error), quote=False)}")
            return absent
        if not isinstance(value, type(absent)):
            self.problems.append(f"{name} is omitted: it holds a {type(value).__name__}, not a {type(absent).__name__}")
            return absent
        return value

    def get(self, *keys: str) -> Any:
        """Value of a setting; None if it or its parent is absent."""
        return dig(self.settings, *keys)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return dig(self.header, "metadata", "card") or {}

    @cached_property
    def _kinds(self) -> dict[str, list[dict[str, Any]]]:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for line in self.stats:
            kinds.setdefault(str(line.get("kind")), []).append(line)
        return kinds

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Lines of stats.jsonl: train, evaluation or warning."""
        return self._kinds.get(kind, [])

    def points(self, key: str, kind: str = "train") -> list[tuple[float, float]]:
        """(images, value) of a logged number; non-finite values are nan."""
        pairs = [(line["images"], line.get(key)) for line in self.lines(kind)]
        return [(x, math.nan if number(y) is None else y) for x, y in pairs if isinstance(y, int | float)]

    @cached_property
    def images(self) -> int:
        return max((line["images"] for line in self.stats), default=0)

    @property
    def warnings(self) -> list[dict[str, Any]]:
        return self.lines("warning")

    @property
    def warning_count(self) -> int:
        return len(self.warnings)

    # -- in words ---------------------------------------------------------------------------------------------------

    @property
    def method(self) -> str:
        objective = self.get("objective") or {}
        name = str(dig(objective, "method") or "")
        if self.pretraining:
            return "Pretraining"
        match name:
            case "dmd":
                return "DMD" if dig(objective, "regression_weight") != 0 else "DMD without regression"
            case "dmd2":
                return "DMD2 with GAN" if dig(objective, "gan_weight") != 0 else "DMD2 without GAN"
            case "sid":
                return "SiD"
        return name or "Unknown method"

    @property
    def calls(self) -> int | None:
        """Network calls per image, whichever way the run names its noise levels; None for a teacher."""
        named = (self.get("generator", way) for way in ("sigmas", "times", "timesteps"))
        return next((len(calls) for calls in named if isinstance(calls, list)), None)

    @property
    def teacher(self) -> str:
        if self.pretraining:
            return str(
                self.provenance.get("data") or self.get("data", "path") or self.get("data", "kind") or "unknown data"
            )
        named = self.provenance.get("teacher") or self.get("teacher", "path") or self.get("teacher", "kind")
        return str(named or "unknown")

    @property
    def title(self) -> str:
        if self.pretraining:
            return f"A teacher, trained on {self.teacher}"
        steps = ", one step" if self.calls == 1 else f", {self.calls} steps" if self.calls else ""
        return f"{self.method}{steps}, from the teacher {self.teacher}"

    @property
    def total(self) -> int | None:
        """Length of the whole run in images."""
        total = self.get("train", "images")
        return total if isinstance(total, int) and total > 0 else None

    @property
    def finished(self) -> bool:
        return self.total is not None and self.images >= self.total

    @property
    def progress(self) -> str:
        if self.total is None:
            return f"{self.images:,}"
        done = "finished" if self.finished else f"{100 * self.images // self.total} % of {self.total:,}"
        return f"{self.images:,} ({done})"

    @cached_property
    def clock(self) -> list[tuple[float, float]]:
        """(images, training seconds), without evaluations."""
        spent, points = 0.0, []
        for line in self.times:
            spent += number(line.get("evaluation_seconds")) or 0.0
            points.append((line["images"], max(0.0, (number(line.get("seconds")) or 0.0) - spent)))
        return points

    @property
    def rate(self) -> float:
        """Training speed in images per second."""
        return self.clock[-1][0] / self.training_seconds if self.training_seconds else 0.0

    @property
    def training_seconds(self) -> float | None:
        return self.clock[-1][1] if self.clock and self.clock[-1][0] > 0 else None

    @cached_property
    def fid(self) -> list[tuple[float, float]]:
        return [(images, fid) for images, fid in self.points("fid", "evaluation") if fid == fid]

    @cached_property
    def measure(self) -> Column:
        """Metric that selects the best checkpoint; FID if nothing was measured."""
        return deciding(self.lines("evaluation")) or MEASURES[0]

    @cached_property
    def scores(self) -> list[tuple[float, float]]:
        """(images, value) of that metric."""
        return [(images, value) for images, value in self.points(self.measure.key, "evaluation") if value == value]

    @property
    def best(self) -> tuple[float, float] | None:
        return min(self.scores, key=lambda point: self.measure.sign * point[1], default=None)

    def when(self, every: str) -> str:
        """Describe when a periodic event happens next, in images."""
        step = self.get("train", every)
        if not isinstance(step, int) or step <= 0:
            return "at the end of the run"
        return f"at {(self.images // step + 1) * step:,} images"

    @property
    def lead(self) -> str:
        """Result in one sentence, if any."""
        rows = [row for row in self.rows if number(row.get("fid")) is not None]
        own = next((row for row in rows if not is_teacher(row) and self.owns(row)), None)
        teacher = teacher_row(row for row in rows if own and row.get("protocol") == own.get("protocol"))
        if own is None or teacher is None or not teacher["fid"]:
            return ""
        text = f"FID {own['fid']:.2f}, {own['fid'] / teacher['fid']:.2f} times the teacher's {teacher['fid']:.2f}"
        calls, many = own.get("calls"), teacher.get("calls")
        if calls and many:
            text = (
                f"{'One network call' if calls == 1 else f'{calls} network calls'} per image instead of {many}. {text}"
            )
        speed, slow = (number(row.get("images_per_second")) for row in (own, teacher))
        return f"{text}; {speed / slow:.3g} times as many images per second." if speed and slow else f"{text}."

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the final evaluation."""
        rows = self.results.get("rows")
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    def owns(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row of results belongs to this folder's weights (or to this folder, if it names no weights)."""
        sha256 = row.get("sha256")
        return sha256 == self.header.get("sha256") if sha256 else any(row is own for own in self.rows)

    @property
    def points_only(self) -> bool:
        """True if samples are points (those of the analytic mixture), not images."""
        return self.get("teacher", "kind") == "mixture"

    @property
    def path(self) -> str:
        """Folder, quoted for a shell."""
        return shlex.quote(str(self.folder))

    # -- pictures ---------------------------------------------------------------------------------------------------

    def drawn(self, name: str) -> list[tuple[int, Path]]:
        """(images, file) of the pictures `name-IMAGES.png`, sorted."""
        found = (self.folder / "pictures").glob(f"{name}-*.png")
        return sorted((int(path.stem.split("-")[1]), path) for path in found if path.stem.split("-")[1].isdigit())

    def open(self, path: Path) -> Image.Image | None:
        """Open a picture; None, with an entry in `problems`, if it cannot be read (the run may be writing it)."""
        try:
            with Image.open(regular_file(path), formats=("PNG",)) as picture:
                if picture.width * picture.height > PIXELS:
                    raise ValueError(f"it has more than {PIXELS:,} pixels")
                return picture.convert("L" if picture.mode in ("1", "L") else "RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            problem = f"pictures/{path.name} cannot be read and is omitted: {error}"
            if problem not in self.problems:
                self.problems.append(problem)
            return None

    @cached_property
    def teacher_grid(self) -> Image.Image | None:
        path = self.folder / "pictures" / "teacher.png"
        return self.open(path) if path.exists() else None

    @cached_property
    def student_grid(self) -> tuple[int, Image.Image] | None:
        for images, path in reversed(self.drawn("samples" if self.pretraining else "student")):
            picture = self.open(path)
            if picture is not None:
                return images, picture
        return None


def _text(path: Path) -> str:
    return read_file(path, TEXT_BYTES).decode()


def dig(values: Any, *keys: str) -> Any:
    """Return `values[key][key]...`, or None if a key is missing."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def is_teacher(row: Mapping[str, Any]) -> bool:
    """Return whether a row is of a teacher: "NAME, N evaluations", optionally ", guidance W" and ", stochastic"."""
    return re.search(r", [\d,]+ evaluations?(,|$)", str(row.get("name"))) is not None


def teacher_row(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Row of the teacher with the largest number of evaluations."""
    scored = [row for row in rows if is_teacher(row) and number(row.get("fid")) is not None]
    return max(scored, key=lambda row: number(row.get("calls")) or 0, default=None)
