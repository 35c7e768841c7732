"""What the rendering of a stranger's template may use: steps, seconds, and characters made.

Texts are bounded before they are made. Values with parts (lists, dicts) are weighed when they are
made, shared parts each time they occur: sixty times `a = [a, a]` is a small thing in memory, but
never ends when it is printed or compared.
"""

import time
from collections.abc import Iterable
from typing import Any

MAX_STEPS = 2_000_000
MAX_SECONDS = 5.0
MAX_TEXT = 64 * 2**20  # characters of one text; weight of one value with parts
MAX_MADE = 2**30  # the same, over all that one rendering makes
MAX_LEVELS = 100
MAX_BITS = 16_384  # of a whole number
PART = 16  # what an element weighs beside its text, about its bytes


class TooMuchWork(Exception):
    """A template exceeded its budget."""


class Budget:
    """What is left to one rendering; nothing before the first `begin`.

    Nothing is left while a template is compiled either, so that what jinja2 would work out then
    (filters of constants) waits for a rendering.
    """

    def __init__(self) -> None:
        self._steps_left, self._made_left, self._deadline = 0, 0, 0.0
        self._weighed: dict[int, tuple[Any, int, int]] = {}

    def begin(self) -> None:
        self._steps_left, self._made_left = MAX_STEPS, MAX_MADE
        self._deadline = time.monotonic() + MAX_SECONDS
        self._weighed.clear()

    def charge(self, steps: int) -> None:
        """Take steps from the budget, or raise `TooMuchWork`."""
        self._steps_left -= steps
        if self._steps_left < 0:
            raise TooMuchWork(f"more than {MAX_STEPS:,} steps")
        if time.monotonic() > self._deadline:
            raise TooMuchWork(f"more than {MAX_SECONDS:g} seconds")

    def bound(self, length: int) -> None:
        """Take a text, or a value of this weight, that is about to be made."""
        if length > MAX_TEXT:
            raise TooMuchWork(f"a text of more than {MAX_TEXT:,} characters")
        self._made_left -= length
        if self._made_left < 0:
            raise TooMuchWork(f"more than {MAX_MADE:,} characters in all")

    def made(self, value: Any) -> Any:
        """The value, taken into account."""
        if isinstance(value, str):
            self.bound(len(value))
        elif isinstance(value, list | tuple | dict):
            self.bound(self.weight(value))
        return value

    def weight(self, value: Any) -> int:
        """Characters of all texts in a value, and something for each part."""
        return self._weigh(value)[0]

    def _weigh(self, value: Any) -> tuple[int, int]:
        """(weight, levels); kept for values with parts, which nothing in a template can change."""
        if isinstance(value, str):
            return len(value) + PART, 0
        if not isinstance(value, list | tuple | dict):
            return PART, 0
        if known := self._weighed.get(id(value)):
            return known[1:]
        self.charge(0)
        weight, levels = PART, 0
        for part in _parts(value):
            own, below = self._weigh(part)
            weight, levels = weight + own, max(levels, below)
            if weight > MAX_TEXT or levels >= MAX_LEVELS:
                raise TooMuchWork("a value of too many parts, or nested too deeply")
        self._weighed[id(value)] = value, weight, levels + 1  # held, so that its id stays its own
        return weight, levels + 1


def _parts(value: Any) -> Iterable[Any]:
    return (*value.keys(), *value.values()) if isinstance(value, dict) else value
