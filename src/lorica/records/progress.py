"""What a display knows of a run: how far it is, how long it still takes, where each adapter's loss
stands.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lorica.records.phrases import number
from lorica.records.smooth import RunningMean

HISTORY = 512  # points kept for the small curve; twice as many are averaged in pairs


@dataclass
class Track:
    """One adapter's course. `best` is the lowest eval loss, at `best_step`."""

    latest: dict = field(default_factory=dict)
    mean: RunningMean = field(default_factory=RunningMean)
    history: list[float] = field(default_factory=list)
    eval_loss: float | None = None
    best: float | None = None
    best_step: int | None = None

    def take(self, row: dict) -> None:
        self.latest |= {key: value for key, value in row.items() if value is not None}
        loss = number(row.get("loss"))
        if loss is not None:
            self.history.append(self.mean.update(loss) or 0.0)
            if len(self.history) >= 2 * HISTORY:
                pairs = zip(self.history[::2], self.history[1::2], strict=True)
                self.history = [(first + second) / 2 for first, second in pairs]
        eval_loss = number(row.get("eval_loss"))
        if eval_loss is not None:
            self.eval_loss = eval_loss
            if self.best is None or eval_loss < self.best:
                self.best, self.best_step = eval_loss, row.get("step")

    @property
    def trend(self) -> int:
        """-1 where the smoothed loss falls, 1 where it rises, 0 where it stays within half a
        percent or is unknown.
        """
        if len(self.history) < 3:
            return 0
        before, current = self.history[-min(10, len(self.history))], self.history[-1]
        return 0 if abs(current - before) <= 5e-3 * abs(before) else 1 if current > before else -1


class Progress:
    """How far a run is. All durations come from `clock`, a monotonic one, so a clock that is set
    changes nothing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._first: tuple[int, float] | None = None  # step and time of the first row
        self._last: tuple[int, float] | None = None
        self.max_steps: int | None = None
        self.epoch: float | None = None
        self.row: dict = {}
        self.peak_memory = 0.0
        self.tracks: dict[str, Track] = {}

    def start(self, manifest: dict) -> None:
        self.max_steps = manifest.get("plan", {}).get("max_steps")
        self._began = self._clock()

    def take(self, row: dict) -> None:
        step = row.get("step")
        if step is not None:
            self._last = (step, self._clock())
            self._first = self._first or self._last
        self.row |= {key: value for key, value in row.items() if value is not None}
        self.epoch = number(row.get("epoch")) or self.epoch
        self.peak_memory = max(self.peak_memory, number(row.get("memory_bytes")) or 0.0)
        self.tracks.setdefault(str(row.get("adapter") or ""), Track()).take(row)

    @property
    def step(self) -> int:
        return self._last[0] if self._last else 0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    @property
    def seconds_left(self) -> float | None:
        """Seconds until max_steps at the pace so far, counting down between rows; never negative,
        None while unknown.
        """
        if not (self.max_steps and self._first and self._last) or self._last[0] <= self._first[0]:
            return None
        pace = (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])
        since = self._clock() - self._last[1]
        return max(0.0, pace * (self.max_steps - self._last[0]) - since)
