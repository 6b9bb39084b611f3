"""Ctrl-C and SIGTERM: the first asks a run to save, the second ends it; neither interrupts a pair of renames.

Knows no run. Signals reach only the main thread; in any other thread these functions do nothing.
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
_received: list[int] = []  # signals since the start of the command


def interrupted() -> bool:
    """Return whether this command was asked to stop, so that later errors need no explanation."""
    return bool(_received)


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Install `handler` for both signals, and restore the previous handlers afterwards. Does nothing outside the main thread."""
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
    """Handle signals of a whole command: the first raises KeyboardInterrupt; the next ends the process at once.

    `whole_process`: the process ends with the command, and a signal during Python's shutdown also ends it at once.
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
    """Turn the first signal into a flag that the loop reads, and each further one into KeyboardInterrupt.

    Args:
        first: called at once to acknowledge the first signal.
        second: makes the message of the second signal's KeyboardInterrupt.

    Yields:
        Whether a signal was received.
    """
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        _received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt(second())
        # in a thread: printing from a handler during another print is an error
        threading.Thread(target=first, daemon=True).start()

    with handling(note):
        yield lambda: bool(received)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay signals while files that belong together are renamed; they take effect afterwards."""
    waiting: list[int] = []
    with handling(lambda number, _frame: waiting.append(number)):
        yield
    for number in waiting:
        signal.raise_signal(number)
