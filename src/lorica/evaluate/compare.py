"""Base against tuned on the same records: is it better, by how much, and how sure is that?

The interval is the paired bootstrap's (Koehn 2004; the percentile interval of Efron): a resample
draws records, and both models are scored on the same draw. The p-value is two-sided: McNemar's
exact test where each record is right or wrong, otherwise approximate randomisation (Noreen 1989;
Riezler and Maxwell 2005), which swaps the two models' results record by record and asks how often
chance alone makes a difference this large. Randomisation keeps its level on few records, where a
bootstrap's p-value is far too small: three records that all improve give p = 0.25, not 0.001. With
few records all swaps are enumerated, and p is exact.

The verdict asks for both: p below 1 - confidence and an interval without 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import binomtest

from lorica.errors import DataError
from lorica.evaluate.metrics import Array, Metric, check_inputs, find_metrics
from lorica.evaluate.score import (
    BLOCK_NUMBERS,
    check_settings,
    percentile_interval,
    resample,
)
from lorica.tasks.task import Prediction

Verdict = Literal["better", "worse", "no evidence"]


@dataclass(frozen=True)
class Comparison:
    """One metric of base and tuned on the same records; `asdict` is the row of run.json's "scores".

    Attributes:
        base, tuned: the scores, in the metric's own scale.
        difference: tuned minus base; `low` and `high` bound it at `confidence` (both equal to it
            where one record leaves nothing to estimate from).
        p: two-sided probability of a difference at least this large if both models were alike.
        num_records: how many records both were scored on.
        higher_is_better: whether a larger score is the better one.
        confidence: nominal coverage of the interval; 1 - confidence is the level of the verdict.
        verdict: "better", "worse" (of tuned) or "no evidence".
    """

    base: float
    tuned: float
    difference: float
    low: float
    high: float
    p: float
    num_records: int
    higher_is_better: bool
    confidence: float
    verdict: Verdict

    def sentence(self, name: str) -> str:
        """The verdict in one line, for example for the head of a report."""
        interval = f"{self.confidence:.0%} interval {_signed(self.low)} to {_signed(self.high)}"
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.3f}"
        head = {
            "better": f"The tuned model is better in {name}",
            "worse": f"The tuned model is worse in {name}",
            "no evidence": f"No evidence of a difference in {name}",
        }[self.verdict]
        return (
            f"{head}: {self.base:.4g} -> {self.tuned:.4g} ({_signed(self.difference)}; {interval}; "
            f"{p}; {self.num_records:,} records)."
        )


def compare(
    base: Sequence[Prediction],
    tuned: Sequence[Prediction],
    metrics: Sequence[str],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Comparison]:
    """Compare two models' predictions of the same records, in the same order.

    The same seed gives the same numbers. What is covered is the choice of records: that another
    training seed would give another model is not.

    Raises:
        ConfigError: an unknown metric (with the nearest name) or a setting out of range.
        DataError: other records or another order on one side, or predictions that lack what a
            metric needs.
    """
    chosen = find_metrics(metrics)
    check_settings(num_resamples, confidence)
    check_inputs(chosen, base)
    check_inputs(chosen, tuned)
    _check_pairs(chosen, base, tuned)
    # Statistics of both sides in one table, so that class columns mean the same on both.
    tables = {metric.name: metric.statistics([*base, *tuned]) for metric in chosen}
    pairs = {name: (table[: len(base)], table[len(base) :]) for name, table in tables.items()}
    differences: dict[str, list[Array]] = {metric.name: [] for metric in chosen}
    for weights in resample(len(base), num_resamples, seed):
        for metric in chosen:
            before, after = pairs[metric.name]
            change = metric.value(weights @ after) - metric.value(weights @ before)
            differences[metric.name].append(change)
    chance = {
        metric.name: _chance(metric, *pairs[metric.name], num_resamples, seed) for metric in chosen
    }
    return {
        metric.name: _comparison(
            metric,
            *pairs[metric.name],
            p=chance[metric.name],
            differences=np.concatenate(differences[metric.name]),
            confidence=confidence,
        )
        for metric in chosen
    }


def _comparison(
    metric: Metric, before: Array, after: Array, *, p: float, differences: Array, confidence: float
) -> Comparison:
    base, tuned = float(metric.value(before.sum(0))), float(metric.value(after.sum(0)))
    low, high = percentile_interval(differences, confidence)
    verdict: Verdict = "no evidence"
    if p < 1.0 - confidence and not low <= 0.0 <= high:
        verdict = "better" if (tuned > base) == metric.higher_is_better else "worse"
    return Comparison(
        base=base,
        tuned=tuned,
        difference=tuned - base,
        low=low,
        high=high,
        p=p,
        num_records=len(before),
        higher_is_better=metric.higher_is_better,
        confidence=confidence,
        verdict=verdict,
    )


def _check_pairs(
    metrics: Sequence[Metric], base: Sequence[Prediction], tuned: Sequence[Prediction]
) -> None:
    if len(base) != len(tuned):
        raise DataError(
            f"the base has {len(base):,} predictions and the tuned model {len(tuned):,}",
            expected="both models' predictions of the same records, in the same order",
        )
    likelihood = any(metric.needs == "nll" for metric in metrics)
    others: list[int] = []
    lengths: list[int] = []
    for row, (before, after) in enumerate(zip(base, tuned, strict=True)):
        if before.record != after.record or before.references != after.references:
            others.append(row)
        elif likelihood and before.num_tokens != after.num_tokens:
            lengths.append(row)
    found = (("another record", others), ("another number of trained tokens", lengths))
    problems = [
        f"{len(rows):,} of {len(base):,} positions hold {what}, the first at {rows[0]}"
        for what, rows in found
        if rows
    ]
    if problems:
        raise DataError(
            "the two models were not run on the same records",
            problems=problems,
            expected="the same records in the same order, encoded alike",
            mend="predict both from one data set with the same settings",
        )


def _chance(metric: Metric, before: Array, after: Array, num_resamples: int, seed: int) -> float:
    """Two-sided p-value of the difference."""
    if metric.proportion:
        gained = int((after[:, 0] > before[:, 0]).sum())
        lost = int((after[:, 0] < before[:, 0]).sum())
        return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    change = after - before
    observed = abs(float(metric.value(after.sum(0)) - metric.value(before.sum(0))))
    # Sums in another order differ in the last digits; a tie must count as a tie.
    least = observed - 1e-9 * max(1.0, observed)
    as_large, count = 0, 0
    exact = 2 ** len(change) <= num_resamples
    for swaps in _all_swaps(len(change)) if exact else _swaps(len(change), num_resamples, seed):
        moved = swaps @ change
        found = metric.value(after.sum(0) - moved) - metric.value(before.sum(0) + moved)
        as_large += int((np.abs(found) >= least).sum())
        count += len(found)
    # The observed labelling is one of the random ones too, so p is never 0 (Phipson, Smyth 2010).
    return as_large / count if exact else (as_large + 1) / (count + 1)


def _all_swaps(num_records: int) -> Iterator[Array]:
    """Every way to swap: one block (2 ** num_records, num_records) of 0 and 1."""
    ways = np.arange(2**num_records)
    yield (ways[:, None] >> np.arange(num_records) & 1).astype(np.float64)


def _swaps(num_records: int, num_resamples: int, seed: int) -> Iterator[Array]:
    """Random swaps: blocks (resamples, num_records) of 0 and 1."""
    generator = np.random.default_rng((seed, 1))  # a stream of its own beside the bootstrap's
    block = max(1, BLOCK_NUMBERS // num_records)
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        yield generator.integers(2, size=(size, num_records)).astype(np.float64)


def _signed(value: float) -> str:
    return f"{value:+.4g}"
