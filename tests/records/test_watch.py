"""Alarms: each fires on its planted fault, once, says what to do, and is silent on a healthy
run.
"""

import math
import random

import pytest

from lorica.records.watch import (
    EvalRising,
    GradientZero,
    LearningRateZero,
    LossNotFalling,
    LossNotFinite,
    LossSpike,
    Watch,
    Watched,
)
from records.run_rows import rows_for


def answers(alarm, rows):
    return [answer for row in rows if (answer := alarm(row)) is not None]


def losses(values, **more):
    return [
        {"step": 10 * (index + 1), "loss": value, "learning_rate": 2e-4} | more
        for index, value in enumerate(values)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_healthy_run_raises_no_alarm(seed):
    watch = Watch(max_steps=500)
    assert [text for row in rows_for("a", 500, seed) for text in watch(row)] == []


@pytest.mark.parametrize("seed", range(10))
def test_noisy_single_record_batches_raise_no_alarm(seed):
    """Batch size 1: the loss scatters by half its size but falls."""
    noise = random.Random(seed)
    values = [
        max(0.05, (1 + 2 * math.exp(-i / 40)) * noise.lognormvariate(0, 0.3)) for i in range(300)
    ]
    watch = Watch(max_steps=3_000)
    assert [text for row in losses(values) for text in watch(row)] == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["loss", "eval_loss", "grad_norm"])
def test_not_finite(key, value):
    row = {"step": 40, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 2e-4} | {key: value}
    (text,) = answers(LossNotFinite(), [row])
    assert "not a finite number at step 40" in text
    assert "lower learning_rate (now 2e-4)" in text
    assert answers(LossNotFinite(), [row | {key: None}]) == []  # not measured


def test_spike_names_both_values():
    calm = [1.5 + 0.02 * math.sin(index) for index in range(40)]
    (text,) = answers(LossSpike(), losses([*calm, 6.0]))
    assert "jumped from about 1.5" in text and "to 6.000 at step 410" in text
    assert answers(LossSpike(), losses([*calm, 1.7])) == []  # many deviations, but small
    assert answers(LossSpike(), losses([*calm[:10], 6.0])) == []  # too little to compare with


def test_spike_over_a_constant_loss_does_not_divide_by_zero():
    assert len(answers(LossSpike(), losses([0.0] * 30 + [1.0]))) == 1


def test_eval_rising_names_the_best_step():
    values = [2.0, 1.5, 1.4, 1.45, 1.5, 1.6]
    rows = [{"step": 100 * (i + 1), "eval_loss": value} for i, value in enumerate(values)]
    (text,) = answers(EvalRising(), rows)
    assert "risen for 3 evaluations; the best was 1.400 at step 300, now it is 1.600" in text
    assert "Keep the checkpoint of the best step" in text
    zigzag = [{"step": i, "eval_loss": 1.5 + 0.1 * (i % 2)} for i in range(30)]
    assert answers(EvalRising(), zigzag) == []


def test_gradient_zero_needs_several_rows():
    rows = [{"step": step, "grad_norm": 0.0} for step in (1, 2, 3)]
    (text,) = answers(GradientZero(), rows)
    assert "no effect on the loss" in text and "lorica inspect" in text
    assert answers(GradientZero(), [rows[0], rows[1], {"step": 3, "grad_norm": 0.1}]) == []


def test_learning_rate_zero_but_not_at_the_end_of_a_schedule():
    rows = [{"step": step, "learning_rate": 0.0} for step in (10, 20)]
    assert len(answers(LearningRateZero(max_steps=100), rows)) == 1
    end = [{"step": step, "learning_rate": 0.0} for step in (96, 98, 100)]
    assert answers(LearningRateZero(max_steps=100), end) == []


def test_loss_not_falling_waits_for_a_part_of_the_run():
    noise = random.Random(0)
    flat = losses([2.3 + noise.gauss(0, 0.1) for _ in range(100)])
    texts = answers(LossNotFalling(max_steps=1_000), flat)
    assert (
        "has not fallen in 60 rows" in texts[0] and "learning_rate 3 to 10 times higher" in texts[0]
    )
    assert answers(LossNotFalling(max_steps=100_000), flat) == []
    falling = losses([2.3 * 0.99**index for index in range(100)])
    assert answers(LossNotFalling(max_steps=1_000), falling) == []


def test_watch_speaks_once_per_adapter_and_names_it():
    watch = Watch()
    texts = []
    for step in range(10):
        for adapter in ("a", "b"):
            texts += watch({"step": step, "adapter": adapter, "grad_norm": 0.0})
    assert len(texts) == 2
    assert texts[0].startswith("a: the gradient norm") and texts[1].startswith("b: ")


class Heard:
    def __init__(self):
        self.events, self.rows, self.ends = [], [], []

    def start(self, manifest):
        self.rows.append(manifest)

    def step(self, row):
        self.rows.append(row)

    def event(self, kind, text):
        self.events.append((kind, text))

    def finish(self, summary):
        self.ends.append(summary)


def test_watched_passes_everything_on_and_adds_warnings():
    heard = Heard()
    watched = Watched(heard)
    watched.start({"plan": {"max_steps": 100}})
    rows = [{"step": step, "learning_rate": 0.0} for step in (96, 97, 98)]
    rows += [{"step": 99, "loss": math.nan}]
    for row in rows:
        watched.step(row)
    watched.event("info", "x")
    watched.finish({"status": "failed"})
    assert heard.rows == [{"plan": {"max_steps": 100}}, *rows]
    assert [kind for kind, _ in heard.events] == ["warning", "info"]
    assert heard.ends == [{"status": "failed"}]
