"""Scores and their intervals: known answers, coverage on simulated data, repeatable."""

import math

import numpy as np
import pytest

from lorica.errors import ConfigError, DataError
from lorica.evaluate.score import percentile_interval, resample, score
from lorica.tasks.task import Prediction


def labels(num_right, num_wrong):
    right = [Prediction({}, math.nan, 1, 1, (1,)) for _ in range(num_right)]
    return right + [Prediction({}, math.nan, 1, 0, (1,)) for _ in range(num_wrong)]


def likelihoods(values, num_tokens=1):
    return [Prediction({}, float(nll), num_tokens, None, ()) for nll in values]


def test_accuracy_has_wilsons_interval():
    found = score(labels(81, 19), ["accuracy"])["accuracy"]
    assert (found.value, found.num_records, found.interval) == (0.81, 100, "wilson")
    assert found.low == pytest.approx(0.7222, abs=1e-4)  # by hand from Wilson's formula
    assert found.high == pytest.approx(0.8749, abs=1e-4)
    perfect = score(labels(10, 0), ["accuracy"])["accuracy"]
    assert perfect.high == 1.0
    assert perfect.low == pytest.approx(0.7225, abs=1e-4)


def test_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    values = np.random.default_rng(1).gamma(2.0, size=507)
    found = score(likelihoods(values), ["loss"])["loss"]
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.2 * half)
    assert found.interval == "bootstrap"
    assert not found.higher_is_better


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        values = generator.gamma(2.0, size=60)  # skewed, mean 2
        found = score(likelihoods(values), ["loss"], num_resamples=400, confidence=0.9)["loss"]
        covered += found.low <= 2.0 <= found.high
    assert 0.84 <= covered / 300 <= 0.95


def test_same_seed_same_interval_and_metrics_do_not_disturb_each_other():
    predictions = likelihoods(np.random.default_rng(2).random(41))
    alone = score(predictions, ["perplexity"], seed=5)
    beside = score(predictions, ["loss", "perplexity"], seed=5)
    assert alone["perplexity"] == beside["perplexity"]
    assert list(beside) == ["loss", "perplexity"]
    assert score(predictions, ["loss"], seed=6)["loss"].low != beside["loss"].low


def test_one_record_has_no_interval():
    assert score(likelihoods([2.5]), ["loss"])["loss"].low is None
    found = score(labels(1, 0), ["accuracy"])["accuracy"]
    assert (found.value, found.low, found.high) == (1.0, None, None)


def test_resamples_come_in_blocks_that_hold_every_draw(monkeypatch):
    whole = np.concatenate(list(resample(13, 101, 3)))
    assert whole.shape == (101, 13)
    assert (whole.sum(1) == 13).all()
    monkeypatch.setattr("lorica.evaluate.score.BLOCK_NUMBERS", 13 * 10)
    blocks = list(resample(13, 101, 3))
    assert [len(block) for block in blocks] == [10] * 10 + [1]
    assert np.array_equal(np.concatenate(blocks), whole)  # memory does not change the draws


def test_undefined_resamples_are_left_out():
    values = np.array([np.nan, 1.0, 2.0, 3.0])
    low, high = percentile_interval(values, 0.5)
    assert (low, high) == (1.5, 2.5)


def test_settings_and_names_are_refused_with_reasons():
    with pytest.raises(ConfigError, match="did you mean 'macro_f1'") as unknown:
        score(labels(2, 2), ["macro-f1"])
    assert unknown.value.exit_code == 2
    with pytest.raises(ConfigError) as caught:
        score(labels(2, 2), ["accuracy"], num_resamples=10, confidence=95)
    assert len(caught.value.problems) == 2
    with pytest.raises(DataError, match="lack their inputs"):
        score(labels(2, 2), ["bleu"])
