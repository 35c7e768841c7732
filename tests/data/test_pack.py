"""Index arithmetic: exact, deterministic, and the same on every machine."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.data.pack import batches, order


def test_order_is_a_fixed_permutation():
    assert order(8, seed=0, epoch=0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert sorted(order(1000, seed=3, epoch=2)) == list(range(1000))
    assert order(1000, seed=3, epoch=2).tolist() == order(1000, seed=3, epoch=2).tolist()
    assert order(1000, seed=3, epoch=2).tolist() != order(1000, seed=3, epoch=3).tolist()
    assert order(1000, seed=3, epoch=2).tolist() != order(1000, seed=4, epoch=2).tolist()
    assert order(0, seed=0).tolist() == [] and order(1, seed=0).tolist() == [0]
    with pytest.raises(ValueError, match="negative"):
        order(3, seed=-1)


def test_order_is_fair():
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[np.arange(5), order(5, seed=seed)] += 1
    assert np.abs(counts / 2000 - 0.2).max() < 0.04


@given(
    st.lists(st.integers(1, 50), max_size=80),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_batches_hold_every_record_once(lengths, batch_size, group, epoch):
    made = batches(lengths, batch_size=batch_size, seed=1, epoch=epoch, group=group)
    assert sorted(i for batch in made for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in made[:-1])
    assert made == batches(lengths, batch_size=batch_size, seed=1, epoch=epoch, group=group)


def test_grouping_saves_padding():
    lengths = order(4096, seed=0).tolist()

    def padded(group):
        made = batches(lengths, batch_size=16, seed=0, group=group)
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in made)

    assert padded(32) < 0.6 * padded(1)
    assert padded(1) > 1.5 * sum(lengths)
    with pytest.raises(ValueError, match="batch_size 0"):
        batches(lengths, batch_size=0, seed=0)
