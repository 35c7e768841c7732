"""Records of a batch that begin alike: what they have in common goes through the model once.

An instruction, a system message or worked examples in front of every question are the same tokens
at the same places, and no token sees what comes after it. So they are rows of their own, and each
record goes on behind them: with four worked examples in front of GSM8K's questions that is three
quarters of the tokens of a batch of 16. The loss and its gradient are the same sums in another
order.

Which records share is a function of the block of records alone, or training beside others would not
equal training alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from lorica.data.encode import Example

WORTH = 64
"""Rows that a beginning must save: less than that is not worth further rectangles of attention with
a mask, and rows are filled up to a multiple of 32 anyway.
"""


@dataclass(frozen=True)
class Beginning:
    """What some examples of a block begin with.

    Attributes:
        members: numbers of the examples.
        length: tokens that they have in common.
    """

    members: tuple[int, ...]
    length: int

    @property
    def saved(self) -> int:
        """Rows that the block is shorter by."""
        return (len(self.members) - 1) * self.length


def beginnings(examples: Sequence[Example]) -> list[Beginning]:
    """The beginnings that are worth it: no example is in two of them, and together they save the
    most rows, less `WORTH` for each.

    Each ends at least one token in front of the first label of its examples, so that no row of it
    has a label and every example has rows of its own. The time it takes grows with the tokens and,
    but for sorting, with the number of examples.
    """
    prompts = [example.input_ids[: max(0, example.num_prompt - 1)] for example in examples]
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    arrays = [np.asarray(prompts[i], dtype=np.int64) for i in order]
    common = [_in_common(a, b) for a, b in pairwise(arrays)]
    top = _tree(order, common)
    own: dict[int, list[int]] = {}
    lengths: dict[int, int] = {}
    waiting: list[tuple[_Stem, int | None]] = [(top, None)] if top else []
    while waiting:
        stem, above = waiting.pop()
        if stem.worth_it(0 if above is None else lengths[above]):
            above = id(stem)
            lengths[above] = stem.length
        if above is not None:
            own.setdefault(above, []).extend(stem.leaves)
        waiting += [(branch, above) for branch in stem.branches]
    found = [Beginning(tuple(sorted(own[one])), lengths[one]) for one in own]
    return sorted(found, key=lambda one: one.members)


@dataclass(eq=False)
class _Stem:
    """Tokens that some examples begin with, in the tree of all such.

    What examples below it save is a function of x, the tokens of the nearest stem above that is
    chosen: an example that goes on behind that one saves x. A stem that is chosen itself costs its
    tokens once, and `WORTH`, and its examples save its own length. So the function is a sum over
    branches, at least what the choice gives: it is convex, rises, and is kept as its value at 0 and
    the places from which on it rises faster.

    Attributes:
        length: number of these tokens.
        leaves: examples that share no more than this with another one.
        branches: longer ones.
        bends: (x, by how much it rises faster from there on), ascending.
    """

    length: int
    leaves: list[int] = field(default_factory=list)
    branches: list[_Stem] = field(default_factory=list)
    saved: float = 0.0
    bends: list[tuple[float, int]] = field(default_factory=list)
    until: float = 0.0

    def close(self) -> None:
        """Decide for which x this is chosen; everything below is closed."""
        self.saved = sum(branch.saved for branch in self.branches)
        bends = sorted(bend for branch in self.branches for bend in branch.bends)
        bends = [(x, more) for x, more in bends if x < self.length]  # none above is as long
        self.bends = [(0.0, len(self.leaves)), *bends] if self.leaves else bends
        chosen = sum((self.length - x) * more for x, more in self.bends) + self.saved
        chosen -= self.length + WORTH
        if chosen > self.saved:
            self._raise_to(chosen)

    def _raise_to(self, value: float) -> None:
        """The larger of the function and a number that it is below at 0."""
        at, here, slope = 0.0, self.saved, 0
        for number, (x, more) in enumerate(self.bends):
            if here + slope * (x - at) >= value:
                self.bends = self.bends[number:]
                break
            at, here, slope = x, here + slope * (x - at), slope + more
        else:
            self.bends = []
        self.until = at + (value - here) / slope
        self.bends = [(self.until, slope), *self.bends]
        self.saved = value

    def worth_it(self, above: int) -> bool:
        """Whether it is chosen behind a stem of so many tokens."""
        return above < self.until


def _tree(order: Sequence[int], common: Sequence[int]) -> _Stem | None:
    """The tree of what examples begin with, each closed; None for less than two examples.

    Args:
        order: the examples, sorted: those that begin alike are neighbours.
        common: tokens that each has in common with the next.
    """
    if not common:
        return None
    path = [_Stem(0)]
    for place, example in enumerate(order):
        before = common[place - 1] if place else 0
        after = common[place] if place < len(common) else 0
        _shorten(path, before)
        if after > path[-1].length:
            path.append(_Stem(after))
        path[-1].leaves.append(example)
    _shorten(path, 0)
    path[0].close()
    return path[0]


def _shorten(path: list[_Stem], length: int) -> None:
    """Leave the stems that are longer than this; the path then ends with one that is not."""
    while path[-1].length > length:
        done = path.pop()
        done.close()
        if path[-1].length < length:
            path.append(_Stem(length))
        path[-1].branches.append(done)


def _in_common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two lists begin with alike."""
    size = min(len(a), len(b))
    differ = a[:size] != b[:size]
    first = int(differ.argmax()) if size else 0
    return first if size and differ[first] else size
