"""What the C library's allocator holds for storages that come and go."""

import subprocess
import sys

import pytest

from lorica.train import heap
from lorica.train.heap import held
from lorica.train.ledger import Event, resident

KIB, MIB = 1024, 1024 * 1024
ROUNDING = 300 * KIB
"""What the top of the heap and pages make more."""

glibc = pytest.mark.skipif(held([(1, MIB)]) is None, reason="another C library")


@glibc
@pytest.mark.parametrize("sizes", [[MIB], [100, 5 * MIB, 3], [33 * MIB, 1, 40 * MIB]])
def test_a_process_holds_what_lives_and_little_more_at_first(sizes):
    found = held([(i, size) for i, size in enumerate(sizes)])
    assert sum(sizes) <= found <= sum(sizes) + ROUNDING


@glibc
def test_a_freed_mapping_goes_back_and_raises_the_threshold():
    once = [(1, 4 * MIB), (1, -4 * MIB)]
    assert held([*once, (2, 5 * MIB)]) < 5 * MIB + ROUNDING
    # now four mebibytes come from the heap, where what lies above keeps them
    events = [*once, (2, 3 * MIB), (3, 200 * KIB), (2, -3 * MIB), (4, 4 * MIB)]
    assert held(events) >= 7 * MIB


@glibc
def test_very_large_pieces_are_always_mapped():
    size = 33 * MIB
    events = [(i, s) for i in range(5) for s in (size, -size)]
    assert size <= held(events) < size + ROUNDING


@glibc
def test_no_memory_is_used_for_it():
    """A tebibyte is asked for in pieces, and what the system refuses is counted all the same."""
    assert held([(i, 64 * 1024 * MIB) for i in range(16)]) >= 2**40
    assert held([(1, 2**60), (1, -(2**60)), (2, MIB)]) >= 2**60


@pytest.mark.parametrize("call", ["no-such-program", sys.executable])
def test_where_it_cannot_be_asked_what_lives_counts(monkeypatch, call):
    monkeypatch.setattr(heap.sys, "executable", call)
    monkeypatch.setattr(heap, "__file__", "/no/such/file")
    assert held([(1, MIB)]) is None
    assert resident([Event(1, MIB), Event(1, -MIB), Event(2, KIB)]) == MIB


def test_a_slow_answer_is_not_waited_for(monkeypatch):
    def late(*args, timeout, **more):
        raise subprocess.TimeoutExpired(args, timeout)

    monkeypatch.setattr(heap.subprocess, "run", late)
    assert held([(1, MIB)]) is None
