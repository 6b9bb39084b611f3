"""Ctrl-C and SIGTERM: the first asks a run to save, the second ends it, and neither falls between two renames.

Knows no run. Signals reach the main thread only; in any other thread nothing here happens.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["INTERRUPTED", "command_signals", "handling", "interrupted", "stop_signals", "uninterrupted"]

INTERRUPTED = 130  # exit code after Ctrl-C or SIGTERM
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []  # since the command began


def interrupted() -> bool:
    """Return whether this command was asked to stop: what it fails with afterwards needs no explanation."""
    return bool(_received)


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handler` answer both signals; those before it come back afterwards. Does nothing outside the main thread."""
    if not _main_thread():
        yield
        return
    # a handler that was not installed from Python (None) cannot be put back
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)


@contextmanager
def command_signals(whole_process: bool) -> Iterator[None]:
    """For a whole command: a signal is a KeyboardInterrupt; the next ends the process at once, whatever it is doing.

    `whole_process`: the process ends with the command, and a signal while Python goes down ends it at once, too.
    """
    _received.clear()

    def stop(number: int, _frame: FrameType | None) -> None:
        _received.append(number)
        if len(_received) > 1:
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    with handling(stop):
        yield
    if whole_process and _received and _main_thread():
        for number in SIGNALS:
            signal.signal(number, stop)


@contextmanager
def stop_signals(first: Callable[[], None], second: Callable[[], str]) -> Iterator[Callable[[], bool]]:
    """Turn the first signal into a flag that the loop reads, each further one into KeyboardInterrupt.

    Args:
        first: says at once that the signal was understood.
        second: what the interruption of a second signal says.

    Yields:
        Whether a signal was received.
    """
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        _received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt(second())
        # in a thread: a print from a handler, in the middle of another print, is an error
        threading.Thread(target=first, daemon=True).start()

    with handling(note):
        yield lambda: bool(received)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let signals wait while files that belong together are renamed; then they act as they would have."""
    waiting: list[int] = []
    with handling(lambda number, _frame: waiting.append(number)):
        yield
    for number in waiting:
        signal.raise_signal(number)
