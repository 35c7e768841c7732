"""Which candidates go on: successive halving over rungs, and who cannot win any more.

At a rung (a share of the run) all candidates that have come so far are put in an order, and a share
of them goes on (Jamieson and Talwalkar 2016, arXiv 1502.07943; over candidates that come one after
the other, Li et al. 2020, arXiv 1810.05934). The order is that of the answer which the search is to
give: the best one, then those that cannot be told from it by one standard error of the paired
difference, the smallest first; behind them the others by their loss. So a small rank is not dropped
for a difference that is noise.

Everything here is a function of what the study holds, without chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lorica.search.answer import paired

Losses = Sequence[float]


@dataclass(frozen=True)
class AtRung:
    """A candidate at a rung: its losses by record, and how many numbers train."""

    number: int
    losses: Losses
    parameters: int

    @property
    def total(self) -> float:
        return math.fsum(self.losses)


def rung_steps(shares: Sequence[float], total: int, every: int) -> tuple[int, ...]:
    """The steps at which candidates are compared: evaluations nearest to these shares of a run.

    Args:
        total: optimizer steps of a run.
        every: steps between evaluations.
    """
    last = (total - 1) // every  # an evaluation at the end compares nobody
    numbers = [min(last, max(1, round(share * total / every))) for share in shares]
    return tuple(sorted({number * every for number in numbers if number > 0}))


def ranked(candidates: Sequence[AtRung], tokens: Sequence[int], errors: float) -> list[int]:
    """Numbers of the candidates, the ones to keep first.

    Args:
        tokens: trained tokens of each evaluation record.
        errors: how many standard errors still count as equal.
    """
    by_loss = sorted(candidates, key=lambda c: (c.total, c.parameters, c.number))
    best, *others = by_loss
    equal = [c for c in others if paired(c.losses, best.losses, tokens).within(errors)]
    rest = [c for c in others if c not in equal]
    equal.sort(key=lambda c: (c.parameters, c.total, c.number))
    return [c.number for c in (best, *equal, *rest)]


def cut_at(
    candidates: Sequence[AtRung],
    tokens: Sequence[int],
    *,
    keep: float,
    errors: float,
    decided: Mapping[int, bool] | None = None,
) -> dict[int, bool]:
    """Who ends at a rung.

    Args:
        candidates: everybody that has reached it so far.
        keep: the share of them that goes on, of whom there is at least one.
        decided: those about whom it was decided before, and whether they ended.

    Returns:
        number -> whether it ends, of those that were undecided.
    """
    decided = decided or {}
    order = ranked(candidates, tokens, errors)
    kept = set(order[: max(1, math.ceil(keep * len(order)))])
    return {number: number not in kept for number in order if number not in decided}


def is_hopeless(
    curve: Mapping[int, float], total: int, best: float, *, margin: float = 0.0
) -> bool:
    """Whether a candidate would end above what another one has reached already, even if it went on
    to fall as fast as in the fastest of its last intervals.

    Loss curves flatten, so that this bound is generous; it asks for three evaluations, and looks at
    the two intervals between them.

    Args:
        curve: step -> evaluation loss, so far.
        total: optimizer steps of the run.
        best: the lowest evaluation loss of any other candidate.
        margin: how far above that it may still end, being as good by the rule of the answer.
    """
    steps = sorted(curve)[-3:]
    if len(steps) < 3 or min(curve.values()) <= best + margin:
        return False
    falls = [max(0.0, (curve[a] - curve[b]) / (b - a)) for a, b in pairwise(steps)]
    lowest = min(curve.values())
    return min(lowest, curve[steps[-1]] - max(falls) * (total - steps[-1])) > best + margin
