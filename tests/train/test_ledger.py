"""What a computation holds, without doing it; and what an allocator makes of that."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lorica.train.ledger import LAST_THRESHOLD, PAGE, Event, Ledger, renumbered, replay

KIB, MIB = 1024, 1024 * 1024


def resident(events) -> int:
    return replay(events)


def test_a_ledger_counts_what_lives_at_once():
    with FakeTensorMode(), Ledger() as ledger:
        a = torch.empty(1000)
        b = a + 1
        c = a.view(10, 100)  # no memory of its own
        del b
        d = torch.empty(500)
    assert ledger.live == 4 * 1500
    assert ledger.peak == 4 * 2000
    assert [e.size for e in ledger.events] == [4000, 4000, -4000, 2000]
    assert c.untyped_storage().nbytes() == 4000 and d.numel() == 500


def test_what_autograd_saves_lives_until_the_backward_pass():
    with FakeTensorMode():
        x = torch.empty(64, 32)
        w = torch.empty(32, 32, requires_grad=True)
        ledger = Ledger()
        ledger.take(x)
        ledger.take(w)
        ledger.forget()
        with ledger:
            y = (x @ w).exp().sum()  # exp keeps its result
            kept = ledger.live
            y.backward()
            del y
    assert kept == 64 * 32 * 4 + 4
    assert ledger.live == 32 * 32 * 4, "the gradient stays"


def test_logits_are_told_by_their_last_dimension():
    with FakeTensorMode(), Ledger(vocabulary=77) as ledger:
        logits, hidden = torch.empty(3, 77), torch.empty(77, 3)
    assert [e.wide for e in ledger.events if e.size > 0] == [True, False]
    del logits, hidden


def test_the_same_stretch_twice_has_other_numbers():
    stretch = [Event(5, 100), Event(7, 50), Event(5, -100)]
    twice = renumbered([stretch, stretch])
    assert [e.number for e in twice] == [1, 2, 1, 3, 4, 3]
    assert sum(e.size for e in twice) == 100


def test_going_of_a_storage_that_never_came_is_left_out():
    assert renumbered([[Event(3, -10), Event(4, 10)]]) == [Event(1, 10)]


@pytest.mark.parametrize("sizes", [[MIB], [100, 5 * MIB, 3], [33 * MIB, 1, 40 * MIB]])
def test_a_process_never_holds_less_than_what_lives(sizes):
    held = resident([Event(i, size) for i, size in enumerate(sizes)])
    assert sum(sizes) <= held <= sum(sizes) + len(sizes) * (PAGE + 1024) + 132 * KIB


def test_a_hole_in_the_heap_is_used_again():
    come = [Event(1, 64 * KIB), Event(2, 64 * KIB), Event(1, -64 * KIB)]
    assert resident([*come, Event(3, 60 * KIB)]) < resident([*come, Event(3, 96 * KIB)])


def test_a_freed_mapping_goes_back_and_raises_the_threshold():
    once = [Event(1, 4 * MIB), Event(1, -4 * MIB)]
    assert resident([*once, Event(2, 5 * MIB)]) < 5 * MIB + 200 * KIB
    # now four mebibytes come from the heap, where what lies above keeps them
    events = [*once, Event(2, 3 * MIB), Event(3, 64), Event(2, -3 * MIB), Event(4, 4 * MIB)]
    assert resident(events) >= 7 * MIB


def test_very_large_pieces_are_always_mapped():
    size = LAST_THRESHOLD + MIB
    come_and_go = [Event(1, size), Event(1, -size)]
    held = resident(renumbered([come_and_go] * 5))
    assert size <= held < size + 200 * KIB


def test_small_objects_hold_large_pieces_apart():
    pieces = [Event(n, 100 * KIB) for n in range(20)]
    gone = [Event(n, -100 * KIB) for n in range(19)]
    filled = [*pieces, *gone]
    again = [Event(n, 100 * KIB) for n in range(20, 39)]
    assert resident([*filled, *again]) > resident(filled) + 500 * KIB, "few holes fit"
    freed = Event(19, -100 * KIB)  # the last one lay on top and kept the others
    assert resident([*filled, freed, *again]) < resident([*filled, *again])
