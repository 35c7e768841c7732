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
from dataclasses import dataclass
from itertools import pairwise, takewhile

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
    most rows.

    Each ends at least one token in front of the first label of its examples, so that no row of it
    has a label and every example has rows of its own.
    """
    prompts = [example.input_ids[: max(0, example.num_prompt - 1)] for example in examples]
    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    common = [_in_common(prompts[a], prompts[b]) for a, b in pairwise(order)]
    # Those that begin alike are neighbours now, so a choice is a cut of this order into runs: the
    # best one up to each place, from the best ones before it.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # gain, where its last run begins, its length
    for end in range(1, len(order) + 1):
        found, shared = (best[-1][0], end - 1, 0), None
        for start in range(end - 2, -1, -1):
            shared = common[start] if shared is None else min(shared, common[start])
            if not shared:
                break
            gain = best[start][0] + (end - start - 1) * shared - WORTH
            found = max(found, (gain, start, shared), key=lambda one: one[0])
        best.append(found)
    chosen, end = [], len(order)
    while end:
        _, start, length = best[end]
        if length:
            chosen.append(Beginning(tuple(sorted(order[start:end])), length))
        end = start
    return chosen


def _in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
