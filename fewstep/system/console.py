"""Console output: notes, progress bars and tables. Progress and warnings go to stderr, results to stdout."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

Value = float | int | str | None

console = Console(stderr=True)
results = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)  # a file has no width limit


@cache
def note(message: str) -> None:
    """Print a sentence on stderr, each sentence only once; `note.cache_clear()` resets this."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {message}", file=sys.stderr)


def say(text: str) -> None:
    """Print a line on stderr, in one process only."""
    if os.environ.get("RANK", "0") == "0":
        console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def waiting(doing: str, after: float = 0.5) -> Iterator[None]:
    """Print what is being done if it takes longer than `after` seconds."""
    timer = threading.Timer(after, say, (doing,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Progress:
    """A progress bar on a terminal; elsewhere a plain line every `every` seconds.

    `with Progress("distil", 200_000) as bar: bar.update(images, fid=12.3)`
    """

    def __init__(
        self,
        description: str,
        total: int,
        seen: int = 0,
        *,
        unit: str = "images",
        enabled: bool = True,
        stream: TextIO | None = None,
        every: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            description: text before the numbers.
            total: images at the end.
            seen: images at the start (of a resumed run).
            unit: unit of the count.
            enabled: False shows nothing, for all ranks but one.
            stream: output; by default the shared `console` (stderr).
            every: seconds between plain lines.
            clock: clock in seconds, for tests.
        """
        self.unit = unit
        self.description, self.total, self.images = description, total, seen
        self.enabled, self.every, self.clock = enabled, every, clock
        self.console = console if stream is None else Console(file=stream)
        self._fields: dict[str, Value] = {}
        self._recent = deque([(clock(), seen)])  # the last minute: (seconds, images)
        self._started = self._last_line = clock()
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._doing: str | None = None

    def __enter__(self) -> Progress:
        self._started = self.clock()
        self._recent = deque([(self._started, self.images)])
        self._last_line = self._started - self.every  # print at the first update
        if self.enabled and self.console.is_interactive:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}", markup=False),
                TimeElapsedColumn(),
                console=self.console,
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task(
                self.description, total=self.total, completed=self.images, numbers=self._numbers()
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.images, numbers=self._numbers())
            self._bar.stop()
            self._bar = None
        elif self.enabled:
            self._print_line()

    @property
    def images_per_second(self) -> float | None:
        """Speed over the last minute; None before the first update."""
        (before, first), (now, last) = self._recent[0], self._recent[-1]
        return (last - first) / (now - before) if now > before else None

    def update(self, images: int, **fields: Value) -> None:
        """Report the images seen; `fields` (`fid=12.3`) are shown until they change."""
        now = self.clock()
        self.images = images
        self._fields.update(fields)
        self._recent.append((now, images))
        while len(self._recent) > 2 and now - self._recent[1][0] >= 60:
            self._recent.popleft()
        if self._bar is not None:
            self._bar.update(self._task, completed=images, numbers=self._numbers())
        elif self.enabled and now - self._last_line >= self.every:
            self._print_line()
            self._last_line = now

    def during(self, doing: str | None, at_once: bool = False) -> None:
        """Show an activity between two updates, such as an evaluation; None ends it. `at_once` prints without waiting."""
        self._doing = doing
        if self._bar is not None:
            self._bar.update(self._task, numbers=self._numbers())
        elif self.enabled and doing is not None and (at_once or self.clock() - self._last_line >= self.every):
            self.print(f"{self.description}: {doing}")
            self._last_line = self.clock()

    def print(self, *objects: Any) -> None:
        """Print above the bar: strings without markup, or anything that rich can show."""
        if self.enabled:
            words = all(isinstance(item, str) for item in objects)
            self.console.print(*objects, markup=False, highlight=False, soft_wrap=words)

    def _numbers(self) -> str:
        rate = self.images_per_second
        if self._doing is not None:
            return f"{self.images:,}/{self.total:,} {self.unit}, {self._doing}"
        parts = [f"{self.images:,}/{self.total:,} {self.unit}"]
        if rate:
            parts += [
                f"{rate:{',.0f' if rate >= 100 else '.3g'}} {self.unit}/s",
                f"{duration((self.total - self.images) / rate)} left",
            ]
        parts += [f"{name}={_cell(value)}" for name, value in self._fields.items()]
        return ", ".join(parts)

    def _print_line(self) -> None:
        elapsed = duration(self.clock() - self._started)
        self.print(f"{self.description}: {self._numbers()}, {elapsed} elapsed")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Value]]) -> Table:
    """Make a table for `results.print(table(...))`: numbers with 4 digits, right-aligned, None as "-".

    Raises ValueError if a row has not one cell per column.
    """
    rows = [list(row) for row in rows]
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"row {row} has {len(row)} cells for {len(columns)} columns {list(columns)}")
    made = Table(title=Text(title), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
    for index, column in enumerate(columns):
        words = any(isinstance(row[index], str) for row in rows)
        made.add_column(
            Text(column), justify="left" if words else "right", overflow="fold", min_width=0 if index else 12
        )
    for row in rows:
        made.add_row(*(Text(_cell(value)) for value in row))
    return made


def _cell(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds: 1:02:03."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


IMPORTED = {  # logger: beginning of what it says as it is imported, about a part that fewstep does not use
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
    "torch.utils._pytree": "%s is an Enum subclass",  # torchao's own classes
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}


def hush() -> None:
    """Leave out three messages of libraries about their own imports, which no user can act on; all others stay."""
    for name, words in IMPORTED.items():
        logger = logging.getLogger(name)
        if not logger.filters:
            logger.addFilter(partial(_is_another, words))


def _is_another(words: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(words)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars of the diffusers and transformers libraries. Their warnings become notes, each once."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    heard = [_Heard(logging.getLogger(name)) for name in ("diffusers", "transformers")]
    for log in logs:
        log.set_verbosity_warning()
        log.disable_progress_bar()
    try:
        for one in heard:
            one.listen()
        yield
    finally:
        for one in heard:
            one.leave()
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:  # not inside another `quiet()`
                log.enable_progress_bar()


_HANDLED = re.compile(  # what fewstep checks and says itself, and what changes nothing
    r"part of your input was truncated|Token indices sequence length|LOAD REPORT|Some weights of|float32: \[\]"
    r"|cannot be saved|`requires_safety_checker`|safety checker|Unable to import"
)


class _Heard(logging.Handler):
    """Takes the place of a library's own handlers."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logging.WARNING)
        self.logger, self.others = logger, list(logger.handlers)

    def listen(self) -> None:
        self.logger.handlers = [self]

    def leave(self) -> None:
        self.logger.handlers = self.others

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if not _HANDLED.search(message):
            note(f"{self.logger.name} warns: {message if len(message) <= 400 else f'{message[:397]}...'}")
