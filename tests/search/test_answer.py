"""The rule of one standard error, and who goes on at a rung, against sums done by hand."""

import math
import os
import statistics
import subprocess
import sys

import pytest

from lorica.search.answer import (
    Judged,
    best_per_budget,
    choose,
    frontier,
    importance,
    paired,
)
from lorica.search.halving import AtRung, cut_at, is_hopeless, ranked, rung_steps

TOKENS = (3, 5, 4, 8)


def judged(number, rank, losses):
    return Judged(number, f"lr {number}", 100 * rank, rank, losses)


def test_a_paired_difference_is_that_of_the_mean_where_records_are_equally_long():
    a, b, n = (3.1, 2.0, 4.4, 3.5), (3.0, 1.7, 4.6, 3.1), (2, 2, 2, 2)
    differences = [(x - y) / 2 for x, y in zip(a, b, strict=True)]
    found = paired(a, b, n)
    assert found.difference == pytest.approx(statistics.mean(differences))
    assert found.error == pytest.approx(statistics.stdev(differences) / math.sqrt(4))


def test_records_of_unequal_length_weigh_by_their_tokens():
    a, b = (6.0, 5.5, 4.0, 16.8), (3.0, 5.0, 4.4, 16.0)
    found = paired(a, b, TOKENS)
    D = (sum(a) - sum(b)) / sum(TOKENS)
    residuals = [x - y - D * n for x, y, n in zip(a, b, TOKENS, strict=True)]
    error = math.sqrt(4 / 3 * sum(e * e for e in residuals)) / sum(TOKENS)
    assert (found.difference, found.error) == pytest.approx((D, error))
    assert not paired((math.nan, 1.0), (1.0, 1.0), (1, 1)).within(9)


def test_the_smallest_within_one_standard_error_is_chosen_and_the_reason_says_so():
    best = judged(3, 16, (3.0, 5.0, 4.0, 8.0))
    near = judged(1, 4, (3.4, 4.8, 4.3, 7.9))  # 0.4 more in all, scattered
    far = judged(0, 2, (3.5, 5.6, 4.4, 9.0))  # worse on every record
    found = choose([far, near, best], TOKENS)
    gap = paired(near.losses, best.losses, TOKENS)
    assert 0 < gap.difference <= gap.error
    assert found.best.number == 3 and found.chosen.number == 1 and found.eligible == (1, 3)
    assert found.frontier == (0, 1, 3)
    text = found.sentence()
    assert text.startswith("rank 4 (lr 1) is the smallest within one standard error of the best")
    assert "25% of the parameters" in text and f"{gap.error:.4f}" in text
    assert choose([far, near, best], TOKENS, errors=0).chosen.number == 3


def test_among_equals_in_size_the_lower_loss_is_chosen():
    slow = judged(0, 4, (3.3, 5.0, 4.0, 8.0))
    fast = judged(1, 4, (3.1, 5.1, 4.0, 8.0))
    large = judged(2, 8, (3.0, 5.0, 4.1, 8.0))
    assert choose([slow, fast, large], TOKENS).chosen.number == 1


def test_a_best_one_that_is_chosen_says_whether_anything_is_smaller():
    best, worse = judged(0, 2, (1.0, 2.0, 3.0, 4.0)), judged(1, 8, (2.0, 3.0, 4.0, 5.5))
    assert "none of them is smaller" in choose([best, worse], TOKENS).sentence()
    assert "the only one that trained to the end" in choose([best], TOKENS).sentence()
    best, worse = judged(0, 8, (1.0, 2.0, 3.0, 4.0)), judged(1, 2, (2.0, 3.0, 4.0, 5.5))
    assert (
        "no smaller one comes within one standard error" in choose([best, worse], TOKENS).sentence()
    )


def test_a_loss_that_is_not_finite_never_wins():
    broken, whole = judged(0, 2, (math.nan,) * 4), judged(1, 8, (1.0, 2.0, 3.0, 4.0))
    found = choose([broken, whole], TOKENS)
    assert found.chosen.number == found.best.number == 1 and found.frontier == (1,)


def test_frontier_and_budgets():
    points = [(0, 100, 2.0), (1, 200, 1.5), (2, 200, 1.7), (3, 400, 1.6), (4, 800, 1.2)]
    assert frontier(points) == (0, 1, 4)
    assert best_per_budget(points) == [(100, 0, 2.0), (200, 1, 1.5), (400, 1, 1.5), (800, 4, 1.2)]


def test_importance_is_the_main_effect_of_a_grid():
    points = [{"r": r, "learning_rate": lr} for r in (4, 8) for lr in (1e-4, 3e-4)]
    losses = [1.0, 3.0, 1.2, 3.2]  # the rate is worth 2, the rank 0.2, and nothing else happens
    found = importance(points, losses)
    assert list(found) == ["learning_rate", "r"]
    assert found["learning_rate"] == pytest.approx(4 / 4.04)
    assert sum(found.values()) == pytest.approx(1)
    assert importance([{"r": 4}, {"r": 4}], [1.0, 2.0]) == {}


def test_importance_is_the_same_in_every_process():
    """Sums of the same numbers in another order have other last bits."""
    code = """
import random
from lorica.search.answer import importance
for seed in range(40):
    draw = random.Random(seed)
    points = [{"r": draw.choice((2, 4, 8)), "b": draw.choice("xyzw")} for _ in range(20)]
    print(importance(points, [draw.random() for _ in points]))
"""

    def said(hash_seed: str) -> bytes:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.check_output([sys.executable, "-c", code], env=environment)

    first = said("0")
    assert first.count(b"\n") == 40
    assert all(said(str(seed)) == first for seed in range(1, 4))


def test_rungs_are_evaluations_before_the_end():
    assert rung_steps((0.125, 0.25), 80, 5) == (10, 20)
    assert rung_steps((0.125, 0.25), 80, 20) == (20,)
    assert rung_steps((0.9,), 80, 30) == (60,)
    assert rung_steps((0.5,), 10, 10) == ()
    assert rung_steps((), 80, 5) == ()


def test_what_cannot_be_told_from_the_best_is_ordered_by_size():
    best = AtRung(7, (3.0, 5.0, 4.0, 8.0), 1600)
    near = AtRung(2, (3.4, 4.8, 4.3, 7.9), 400)
    middle = AtRung(4, (3.2, 4.9, 4.2, 7.9), 800)
    far = AtRung(0, (3.5, 5.6, 4.4, 9.0), 200)
    assert ranked([far, near, middle, best], TOKENS, 1.0) == [7, 2, 4, 0]
    assert ranked([far, near, middle, best], TOKENS, 0.0) == [7, 4, 2, 0]
    assert cut_at([far, near, middle, best], TOKENS, keep=0.5, errors=1.0) == {
        7: False,
        2: False,
        4: True,
        0: True,
    }


def test_who_comes_later_is_compared_with_all_that_came_before():
    first = [AtRung(0, (1.0,) * 4, 100), AtRung(1, (2.0, 2.1, 2.0, 2.0), 100)]
    late = AtRung(2, (1.5, 1.6, 1.5, 1.5), 100)
    decided = {0: False, 1: True}
    assert cut_at([*first, late], TOKENS, keep=0.5, errors=1.0, decided=decided) == {2: False}
    worst = AtRung(3, (9.0,) * 4, 100)
    assert cut_at([*first, worst], TOKENS, keep=0.5, errors=1.0, decided=decided) == {3: True}
    assert cut_at([first[0]], TOKENS, keep=0.5, errors=1.0) == {0: False}


def test_hopeless_is_who_could_not_reach_the_best_at_its_own_pace():
    slow = {10: 2.00, 20: 1.98, 30: 1.97}
    assert is_hopeless(slow, 100, best=1.5)  # at best 1.97 - 70 * 0.002 = 1.83
    assert not is_hopeless(slow, 100, best=1.85)
    assert not is_hopeless(slow, 100, best=1.5, margin=0.35)
    assert not is_hopeless({10: 2.0, 20: 1.9}, 100, best=0.1)  # two evaluations tell nothing
    assert not is_hopeless({10: 2.0, 20: 1.7, 30: 1.6}, 40, best=1.6)  # it is the best
    rising = {10: 1.6, 20: 1.9, 30: 2.4}
    assert is_hopeless(rising, 40, best=1.5)
