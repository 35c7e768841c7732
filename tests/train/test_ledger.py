"""What a computation holds, without doing it."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lorica.train.ledger import Event, Ledger, most_alive, renumbered


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


def test_the_most_that_lives_at_once():
    events = [Event(1, 100), Event(2, 50), Event(1, -100), Event(3, 20)]
    assert most_alive(events) == 150


def test_only_the_memory_of_one_device_counts():
    ledger = Ledger(device="meta")
    with ledger:
        here = torch.empty(100)
        there = torch.empty(50, device="meta")
        assert ledger.live == 200
        del there
    assert ledger.live == 0 and here.numel() == 100
