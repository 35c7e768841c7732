"""Index arithmetic: exact, deterministic, and the same on every machine."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorica.data.pack import batches, efficiency, order, pack, samples
from lorica.errors import DataError


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


@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 40))
def test_samples_from_any_place_continue_the_run(num_records, start, count):
    whole = samples(0, 100, num_records=num_records, seed=7)
    part = samples(start, count, num_records=num_records, seed=7)
    assert part.tolist() == whole[start : start + count].tolist()
    epoch = whole[:num_records]
    assert sorted(epoch) == list(range(num_records))


def test_samples_need_records():
    with pytest.raises(DataError, match="no records"):
        samples(0, 1, num_records=0, seed=0)


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


def first_fit_decreasing(lengths, capacity):
    """The textbook's version, in quadratic time."""
    bins, free = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for number, room in enumerate(free):
            if room >= lengths[index]:
                bins[number].append(index)
                free[number] -= lengths[index]
                break
        else:
            bins.append([index])
            free.append(capacity - lengths[index])
    return [sorted(content) for content in bins]


@given(st.lists(st.integers(1, 40), max_size=120), st.integers(40, 100))
def test_pack_is_first_fit_decreasing(lengths, capacity):
    assert pack(lengths, capacity=capacity) == first_fit_decreasing(lengths, capacity)


@given(st.lists(st.integers(1, 64), max_size=200), st.integers(0, 5))
def test_pack_holds_every_document_once_and_whole(lengths, seed):
    bins = pack(lengths, capacity=64, seed=seed)
    assert sorted(i for content in bins for i in content) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in content) <= 64 for content in bins)
    assert bins == pack(lengths, capacity=64, seed=seed)
    assert len(bins) == len(pack(lengths, capacity=64))


def test_pack_is_shuffled_by_the_seed_and_fast():
    lengths = (order(100_000, seed=0) % 500 + 1).tolist()
    bins = pack(lengths, capacity=2048, seed=0)
    assert bins != pack(lengths, capacity=2048, seed=1)
    assert efficiency(bins, lengths, capacity=2048) > 0.99
    assert efficiency([], [], capacity=8) == 1.0 and pack([], capacity=8) == []


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(DataError) as caught:
        pack([3, 9, 0, 12], capacity=8)
    text = str(caught.value)
    assert "2 documents are longer than 8; the longest: 12" in text and "document 2 has 0" in text
