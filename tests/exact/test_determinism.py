"""What gives the same bits, and what is only close: the same steps computed in other ways."""

from dataclasses import replace

import pytest
import torch

from exact.measured import (
    CLOSE,
    CLOSE_IN_FLOAT64,
    DROPOUT,
    SAME_BITS,
    TOLERANCES,
    digest,
    errors,
    result,
    steps_of,
)


@pytest.mark.parametrize("name", SAME_BITS)
def test_the_same_bits(name):
    one, other = SAME_BITS[name]
    (losses, factors), (again, factors_again) = result(one), steps_of(other)
    assert losses == again
    assert digest(factors) == digest(factors_again)


def test_another_seed_gives_other_bits():
    one, other = result(DROPOUT)[1], steps_of(replace(DROPOUT, seed=4))[1]
    assert digest(one) != digest(other)


@pytest.mark.parametrize("name", CLOSE)
def test_close(name):
    loss, factors = errors(*CLOSE[name])
    assert loss <= TOLERANCES["close loss"]
    assert factors <= TOLERANCES["close factors"]


@pytest.mark.parametrize("name", CLOSE_IN_FLOAT64)
def test_what_differs_is_rounding(name):
    assert all(way.dtype == torch.float64 for way in CLOSE_IN_FLOAT64[name])
    assert max(errors(*CLOSE_IN_FLOAT64[name])) <= TOLERANCES["close, float64"]
