"""The answer of a search: which candidate, and why.

The rule is that of one standard error (Breiman, Friedman, Olshen and Stone 1984, section 3.4.3;
Hastie, Tibshirani and Friedman 2009, section 7.10): of the models that are no worse than the best
one by more than a standard error, take the simplest. Here it is paired. All candidates are judged
on the same N evaluation records; candidate c has the summed loss l_ci on record i, which has n_i
trained tokens, and its evaluation loss is L_c = sum_i l_ci / sum_i n_i. Against the best one, b,

    D   = L_c - L_b
    e_i = l_ci - l_bi - D n_i
    SE  = sqrt(N / (N - 1) * sum_i e_i^2) / sum_i n_i

which is the standard error of a ratio of sums over records (Cochran 1977, section 6.4, without the
correction for a finite population). Eligible are all c with D <= SE; chosen is the one with the
fewest trained parameters, and among equals the one with the lowest loss. What is covered is the
choice of records: that another seed would give other adapters is not, nor that the best of many is
best partly by luck.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Paired:
    """A difference of evaluation losses (nats per token) with its standard error over records."""

    difference: float
    error: float

    def within(self, errors: float) -> bool:
        """Whether the difference is at most so many standard errors. A loss that is not finite
        never is.
        """
        return self.difference <= errors * self.error


def paired(losses: Sequence[float], others: Sequence[float], tokens: Sequence[int]) -> Paired:
    """The paired difference of two candidates on the same records.

    Args:
        losses, others: summed loss of each record.
        tokens: trained tokens of each record.
    """
    a, b, n = (np.asarray(x, dtype=np.float64) for x in (losses, others, tokens))
    total = n.sum()
    difference = (a.sum() - b.sum()) / total
    residuals = a - b - difference * n
    number = len(n)
    error = math.inf if number < 2 else math.sqrt(number / (number - 1) * (residuals**2).sum())
    return Paired(float(difference), 0.0 if number < 2 else float(error / total))


@dataclass(frozen=True)
class Judged:
    """A candidate that trained to its end.

    Attributes:
        number, name: of the candidate; its own settings in words.
        parameters: numbers that train.
        rank: `r`; None for a method without one.
        losses: summed loss of each evaluation record.
    """

    number: int
    name: str
    parameters: int
    rank: int | None
    losses: Sequence[float]

    @property
    def total(self) -> float:
        return math.fsum(self.losses)


@dataclass(frozen=True)
class Answer:
    """What a search found.

    Attributes:
        chosen, best: candidates.
        differences: number -> paired difference to the best one.
        eligible: numbers of those within the standard errors.
        frontier: numbers of those that no other beats in both loss and parameters, the smallest
            first.
        sizes: parameters of all of them.
        errors: how many standard errors were allowed.
        num_records: evaluation records.
    """

    chosen: Judged
    best: Judged
    differences: Mapping[int, Paired]
    eligible: tuple[int, ...]
    frontier: tuple[int, ...]
    sizes: tuple[int, ...]
    errors: float
    num_records: int

    def sentence(self) -> str:
        """The choice and its reason."""
        head = _named(self.chosen)
        if len(self.differences) == 1:
            return f"{head} is the only one that trained to the end; the others were ended early"
        if self.chosen.number == self.best.number:
            smaller = any(c < self.chosen.parameters for c in self.sizes)
            beside = f"no smaller one comes within {_errors(self.errors)} of it"
            return (
                f"{head} has the lowest evaluation loss of the {len(self.differences)} that "
                f"trained to the end, and {beside if smaller else 'none of them is smaller'} "
                f"({self.num_records:,} records, paired)"
            )
        found = self.differences[self.chosen.number]
        share = self.chosen.parameters / self.best.parameters
        return (
            f"{head} is the smallest within {_errors(self.errors)} of the best "
            f"({_named(self.best)}): its loss is {found.difference:+.4f} with "
            f"a standard error of {found.error:.4f} over {self.num_records:,} records, for "
            f"{share:.0%} of the parameters"
        )


def _named(candidate: Judged) -> str:
    if candidate.rank is None:
        return f"{candidate.name} with {candidate.parameters:,} parameters"
    said = candidate.name.startswith(f"rank {candidate.rank}")
    return candidate.name if said else f"rank {candidate.rank} ({candidate.name})"


def _errors(number: float) -> str:
    return "one standard error" if number == 1 else f"{number:g} standard errors"


def choose(candidates: Sequence[Judged], tokens: Sequence[int], *, errors: float = 1.0) -> Answer:
    """The answer of those candidates that trained to their end, of which there is one at least."""
    finite = [c for c in candidates if math.isfinite(c.total)]
    best = min(finite, key=lambda c: (c.total, c.parameters, c.number))
    differences = {c.number: paired(c.losses, best.losses, tokens) for c in finite}
    eligible = [c for c in finite if c is best or differences[c.number].within(errors)]
    chosen = min(eligible, key=lambda c: (c.parameters, c.total, c.number))
    return Answer(
        chosen=chosen,
        best=best,
        differences=differences,
        eligible=tuple(c.number for c in eligible),
        frontier=frontier([(c.number, c.parameters, c.total) for c in finite]),
        sizes=tuple(c.parameters for c in finite),
        errors=errors,
        num_records=len(tokens),
    )


def frontier(points: Sequence[tuple[int, int, float]]) -> tuple[int, ...]:
    """Those of (number, parameters, loss) that no other one beats or equals in both."""
    found: list[int] = []
    lowest = math.inf
    for number, _, loss in sorted(points, key=lambda point: (point[1], point[2], point[0])):
        if loss < lowest:
            found.append(number)
            lowest = loss
    return tuple(found)


def best_per_budget(points: Sequence[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """(budget, number, loss): with so many parameters at most, the best is that one. A budget is
    listed for every size that there is.
    """
    found = []
    for budget in sorted({parameters for _, parameters, _ in points}):
        within = [point for point in points if point[1] <= budget]
        number, _, loss = min(within, key=lambda point: (point[2], point[1], point[0]))
        found.append((budget, number, loss))
    return found


def importance(points: Sequence[Mapping[str, Any]], losses: Sequence[float]) -> dict[str, float]:
    """How much of the variance of the losses each setting explains by itself, from 0 to 1.

    Semantics: for each setting the variance of the mean losses of its values, weighted by how many
    candidates have them, over the variance of all losses (the correlation ratio, eta squared).
    Where the candidates are a full grid these are the main effects of an analysis of variance, and
    what they leave to 1 is interaction; where they are not, settings that go together share.

    Args:
        points: the settings of each candidate; numbers of many values are put into four groups of
            equal size.
        losses: of each candidate after the same number of steps.
    """
    y = np.asarray(losses, dtype=np.float64)
    whole = float(((y - y.mean()) ** 2).sum()) if len(y) else 0.0
    keys = list(dict.fromkeys(key for point in points for key in point))
    found: dict[str, float] = {}
    for key in keys:
        groups = _groups([point.get(key) for point in points])
        if len(set(groups)) < 2:
            continue
        between = 0.0
        # in the order in which they appear: that of a set of words is another in each process
        for group in dict.fromkeys(groups):
            own = y[[index for index, one in enumerate(groups) if one == group]]
            between += len(own) * float(own.mean() - y.mean()) ** 2
        found[key] = between / whole if whole else 0.0
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _groups(values: Sequence[Any]) -> list[Any]:
    """A label for each value: itself, or of many numbers the quarter in which it lies."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers or len(set(values)) <= 4:
        return [str(value) for value in values]
    ends = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75])
    return [int(np.searchsorted(ends, value)) for value in values]
