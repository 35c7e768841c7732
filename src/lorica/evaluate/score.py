"""Scores of one model on one set of records, each with an interval."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from lorica.errors import ConfigError
from lorica.evaluate.metrics import Array, Metric, check_inputs, find_metrics
from lorica.tasks.task import Prediction

# Resamples are drawn in blocks, so that memory stays bounded on large sets.
BLOCK_NUMBERS = 8_000_000


@dataclass(frozen=True)
class Score:
    """A metric's value with the interval that its records leave open.

    Attributes:
        value: the score on all records, in the metric's own scale.
        low, high: ends of the interval at `confidence`; None where fewer than two records leave
            nothing to estimate it from.
        num_records: how many records were scored.
        higher_is_better: whether a larger value is the better one.
        confidence: the interval's nominal coverage.
        interval: "wilson" (a share of records) or "bootstrap" (percentile).
    """

    value: float
    low: float | None
    high: float | None
    num_records: int
    higher_is_better: bool
    confidence: float
    interval: str


def score(
    predictions: Sequence[Prediction],
    metrics: Sequence[str],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Score]:
    """Score `predictions`; the interval covers the choice of records, not the choice of seeds.

    Wilson's score interval (Wilson 1927) where the metric is a share of records, otherwise the
    percentile bootstrap over records (Efron 1979). Below about 30 records the bootstrap's interval
    is too narrow, as everywhere.

    Raises:
        ConfigError: an unknown metric (with the nearest name) or a setting out of range.
        DataError: predictions that lack what a metric needs.
    """
    chosen = find_metrics(metrics)
    check_settings(num_resamples, confidence)
    check_inputs(chosen, predictions)
    tables = {metric.name: metric.statistics(predictions) for metric in chosen}
    resampled = [metric for metric in chosen if not metric.proportion]
    values: dict[str, list[Array]] = {metric.name: [] for metric in resampled}
    for weights in resample(len(predictions), num_resamples, seed) if resampled else ():
        for metric in resampled:
            values[metric.name].append(metric.value(weights @ tables[metric.name]))
    return {
        metric.name: _score(metric, tables[metric.name], values.get(metric.name), confidence)
        for metric in chosen
    }


def _score(metric: Metric, table: Array, values: list[Array] | None, confidence: float) -> Score:
    total = table.sum(0)
    low, high = None, None
    if len(table) > 1 and metric.proportion:
        test = binomtest(int(total[0]), int(total[1]))
        low, high = map(float, test.proportion_ci(confidence_level=confidence, method="wilson"))
    elif len(table) > 1 and values:
        low, high = percentile_interval(np.concatenate(values), confidence)
    return Score(
        value=float(metric.value(total)),
        low=low,
        high=high,
        num_records=len(table),
        higher_is_better=metric.higher_is_better,
        confidence=confidence,
        interval="wilson" if metric.proportion else "bootstrap",
    )


def check_settings(num_resamples: int, confidence: float) -> None:
    """Refuse settings that no interval can be made with.

    Raises:
        ConfigError: all of them at once.
    """
    problems = []
    if num_resamples < 100:
        problems.append(f"num_resamples is {num_resamples}; an interval needs at least 100")
    if not 0.5 <= confidence < 1.0:
        problems.append(f"confidence is {confidence}; it lies from 0.5 to below 1")
    if problems:
        raise ConfigError("these settings make no interval", problems=problems)


def resample(num_records: int, num_resamples: int, seed: int) -> Iterator[Array]:
    """How often each record is drawn in each resample: blocks (resamples, num_records) of float64.

    The draws depend on the seed and the number of records only, so two models' scores see the same.
    """
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_NUMBERS // num_records)
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        drawn = generator.integers(num_records, size=(size, num_records))
        drawn += np.arange(size)[:, None] * num_records
        counts = np.bincount(drawn.ravel(), minlength=size * num_records)
        yield counts.reshape(size, num_records).astype(np.float64)


def percentile_interval(values: Array, confidence: float) -> tuple[float, float]:
    """The central `confidence` share of resampled values (an undefined resample is left out)."""
    tail = 50.0 * (1.0 - confidence)
    low, high = np.nanpercentile(values, [tail, 100.0 - tail])
    return float(low), float(high)
