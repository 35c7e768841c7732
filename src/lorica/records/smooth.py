"""Noisy curves made readable: a running mean, and fewer points."""

import math
from collections.abc import Sequence
from itertools import accumulate


class RunningMean:
    """An exponential mean whose early values are not pulled to 0 (the bias correction of Adam,
    arXiv 1412.6980).

    Args:
        weight: of the past, in [0, 1); 0.9 looks back about 10 values.
    """

    def __init__(self, weight: float = 0.9) -> None:
        self.weight = weight
        self.value: float | None = None
        self._sum = self._norm = 0.0

    def update(self, value: float) -> float | None:
        """Take the next value (a non-finite one is passed over) and give the mean; None before the
        first.
        """
        if math.isfinite(value):
            self._sum = self.weight * self._sum + (1 - self.weight) * value
            self._norm = self.weight * self._norm + (1 - self.weight)
            self.value = self._sum / self._norm
        return self.value


def smoothed(values: Sequence[float], part: float = 0.05) -> list[float]:
    """The mean over a window around each value, `part` of the whole: no lag, unlike the running
    mean.

    Towards both ends the window shrinks to what there is on both sides.
    """
    half = round(len(values) * part / 2)
    sums = [0.0, *accumulate(values)]
    means = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        means.append((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1))
    return means


def thinned(
    xs: Sequence[float], ys: Sequence[float], limit: int
) -> tuple[list[float], list[float]]:
    """At most about `limit` points of a curve that keep its highs and lows: the lowest and the
    highest of each bucket.
    """
    if len(xs) <= limit:
        return list(xs), list(ys)
    bucket = math.ceil(2 * len(xs) / limit)
    kept: list[int] = []
    for start in range(0, len(xs), bucket):
        indices = range(start, min(start + bucket, len(xs)))
        kept += sorted({min(indices, key=ys.__getitem__), max(indices, key=ys.__getitem__)})
    return [xs[index] for index in kept], [ys[index] for index in kept]
