"""The first signal lets the step end and saves; the second stops at once.

One that is only an echo of the first does not count: a scheduler signals every process of a job,
and torchrun hands on to its processes what it was sent itself.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lorica.errors import Interrupted
from lorica.records.folder import how_to_resume
from lorica.records.signals import signals_heard

_ECHO, _ECHO_OF_KEYS = 2.0, 0.5
"""Seconds within which a second signal may be the first one again; of Ctrl-C by torchrun."""


class StopAsked(Exception):
    """Raised by `Stop.check` where the work at hand can be left."""


class Stop:
    """Whether somebody asked the run to stop, and by which signal.

    Args:
        agree: of several processes that go on in step, one of which was asked: makes one number of
            the signal of each, 0 where none came.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.agree = agree
        self.own: int | None = None
        """The first signal to this process itself."""
        self.agreed: int | None = None
        """What one of several processes was sent, once all know of it."""
        self._since = 0.0

    @property
    def asked(self) -> int | None:
        """The signal that the run is stopped by."""
        return self.agreed or self.own

    def check(self) -> None:
        """Raises StopAsked where somebody asked."""
        if self.agree is not None:
            self.agreed = self.agree(self.asked or 0) or None
        if self.asked is not None:
            raise StopAsked

    def handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.own is None:
            self.own, self._since = number, now
        elif now - self._since >= _echo_of(number):  # asked twice: now
            raise KeyboardInterrupt

    def error(self, folder: Path, *, saved: bool) -> Interrupted:
        """What is told then; the exit code is 128 and the number of the signal."""
        number = self.asked or signal.SIGINT
        state = "the state was saved" if saved else "at once; the last checkpoint stands"
        error = Interrupted(
            f"stopped by {signal.Signals(number).name}: {state}",
            mend=f"go on with: {how_to_resume(folder)}",
        )
        error.exit_code = 128 + number  # type: ignore[misc]
        error.together = saved and self.agreed is not None
        return error


def _echo_of(number: int) -> float:
    """For how long a second signal of this number says nothing new. Keys that a person presses
    come once, but for torchrun, which the terminal sends them to as well.
    """
    if number != signal.SIGINT:
        return _ECHO
    return _ECHO_OF_KEYS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


@contextmanager
def stopping(agree: Callable[[int], int] | None = None) -> Iterator[Stop]:
    """Listen for signals, where this is the main thread. `agree` as of `Stop`."""
    stop = Stop(agree)
    with signals_heard(stop.handle):
        yield stop
