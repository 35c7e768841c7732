"""Signals that are held back for a while, for work that must not be left in the middle."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a process to stop."""


@contextmanager
def signals_wait() -> Iterator[None]:
    """Hold signals back for work of a second at most; then they reach their handlers.

    Such work is a file that says how a run ended, and compiled code that calls Python: torch ends
    the process (SIGABRT, without a word) where a handler raises inside such a call, as in a
    dispatch mode.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {n: signal.getsignal(n) for n in HEARD}
    held = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in held:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
