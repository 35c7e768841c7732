"""The first signal lets the step end and saves; the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lorica.errors import Interrupted
from lorica.records.folder import how_to_resume

_HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopAsked(Exception):
    """Raised by `Stop.check` where the work at hand can be left."""


class Stop:
    """Whether somebody asked the run to stop, and by which signal.

    Args:
        agree: of several processes that go on in step, one of which was asked: makes one number of
            the signal of each, 0 where none came.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.asked: int | None = None
        self.agree = agree

    def check(self) -> None:
        """Raises StopAsked where somebody asked."""
        if self.agree is not None:
            self.asked = self.agree(self.asked or 0) or None
        if self.asked is not None:
            raise StopAsked

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:  # asked twice: now
            raise KeyboardInterrupt
        self.asked = number

    def error(self, folder: Path, *, saved: bool) -> Interrupted:
        """What is told then; the exit code is 128 and the number of the signal."""
        number = self.asked or signal.SIGINT
        state = "the state was saved" if saved else "at once; the last checkpoint stands"
        error = Interrupted(
            f"stopped by {signal.Signals(number).name}: {state}",
            mend=f"go on with: {how_to_resume(folder)}",
        )
        error.exit_code = 128 + number  # type: ignore[misc]
        return error


@contextmanager
def stopping(agree: Callable[[int], int] | None = None) -> Iterator[Stop]:
    """Listen for signals, where this is the main thread. `agree` as of `Stop`.

    Those that the process was told to ignore (nohup, a shell's background jobs) stay ignored.
    """
    stop = Stop(agree)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {n: signal.getsignal(n) for n in _HEARD}
    heard = [n for n, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in heard:
        signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number in heard:
            signal.signal(number, before[number])


@contextmanager
def signals_wait() -> Iterator[None]:
    """Hold signals back for a while: for work of a second in which compiled code calls Python.

    torch ends the process (SIGABRT, without a word) where a handler raises inside such a call, as
    in a dispatch mode. What came meanwhile reaches its handler when the work is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {n: signal.getsignal(n) for n in _HEARD}
    heard = {n: h for n, h in before.items() if callable(h)}
    for number in heard:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
