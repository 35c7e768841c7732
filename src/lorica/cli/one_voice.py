"""Of several processes that fail alike, the first one says so.

What is wrong with settings or data is found by each. Another process than the first one keeps an
error back for a while: torchrun ends it as soon as the first one has failed, and then its error is
that one's, which was told. Where nobody ends it, the error is its own.
"""

from __future__ import annotations

import os
import signal
import threading
import time

from lorica.errors import Interrupted, LoricaError

HOLD_BACK, _PAUSE = 30.0, 0.1
"""Seconds for which an error is kept back, and between two looks."""


def speaks(error: Exception) -> bool:
    """Whether this process is to print an error; may take a while. `ranks.ranks` says by which
    names torchrun is known; a queue may have set some of them for a process alone.
    """
    if not {"RANK", "LOCAL_WORLD_SIZE"} <= {*os.environ} or os.environ["RANK"] == "0":
        return True
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    if isinstance(error, Interrupted):  # all are stopped together
        return False
    if isinstance(error, LoricaError) and not error.shared:
        return True
    return not _ended_within(HOLD_BACK)


def _ended_within(seconds: float) -> bool:
    """Whether somebody asks this process to end in so many seconds."""
    asked, end = threading.Event(), time.monotonic() + seconds
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())
    try:
        while not asked.is_set() and time.monotonic() < end:
            time.sleep(_PAUSE)
        return asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
