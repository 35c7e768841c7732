"""Who hears the signals that ask a process to stop, and work for which they wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a process to stop."""


@contextmanager
def signals_heard(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Give signals to `handler` for a while, where this is the main thread.

    Those that the process was told to ignore (nohup, a shell's background jobs) stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in HEARD}
    heard = {n: earlier for n, earlier in before.items() if earlier not in (signal.SIG_IGN, None)}
    for number in heard:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in heard.items():
            signal.signal(number, earlier)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Hold signals back for work of a second at most; then they reach their handlers.

    Such work is a file that says how a run ended, and compiled code that calls Python: torch ends
    the process (SIGABRT, without a word) where a handler raises inside such a call, as in a
    dispatch mode.
    """
    came: list[int] = []
    try:
        with signals_heard(lambda number, frame: came.append(number)):
            yield
    finally:
        for number in came:
            signal.raise_signal(number)
