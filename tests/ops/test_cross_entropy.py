"""The loss of a frozen head against its Semantics line, in value, gradient, bits and memory."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lorica.ops.cross_entropy import (
    BUDGET,
    FEWEST,
    bytes_of_a_row,
    linear_cross_entropy,
    rows_of_a_piece,
)
from lorica.train.ledger import Ledger

SHAPES = [(1, 33, 7), (33, 127, 12), (127, 250, 33), (250, 1031, 48), (64, 8, 1)]


def given(T, V, D, *, dtype=torch.float64, bias=False, spread=1.0, seed=0):
    """hidden, weight, targets, bias; logits have a standard deviation of `spread`."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) * spread / D**0.5
    targets = torch.randint(V, (T,), generator=generator)
    b = torch.randn(V, generator=generator, dtype=torch.float64) if bias else None
    narrow = None if b is None else b.to(dtype)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), targets, narrow


def semantics(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, reduction="none")


def both(losses: Tensor, hidden: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad((losses * upstream).sum(), hidden)
    return losses.detach(), gradient


def weights_of_rows(T: int) -> Tensor:
    return torch.linspace(-1, 2, T)


@pytest.mark.parametrize("rows", [None, 32], ids=["whole", "pieces"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["64", "32"]
)
def test_it_is_the_semantics_line(shape, bias, rows, dtype, tolerance):
    hidden, weight, targets, b = given(*shape, dtype=dtype, bias=bias, spread=3.0)
    upstream = weights_of_rows(shape[0]).to(dtype)
    found = both(linear_cross_entropy(hidden, weight, targets, b, rows=rows), hidden, upstream)
    wanted = both(semantics(hidden, weight, targets, b), hidden, upstream)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_gradcheck():
    hidden, weight, targets, bias = given(37, 11, 5, bias=True)
    torch.autograd.gradcheck(
        lambda h: linear_cross_entropy(h, weight, targets, bias, rows=32), (hidden,)
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_errs_at_most_half_as_much_again_as_plain(shape):
    hidden, weight, targets, _ = given(*shape, dtype=torch.bfloat16, spread=3.0)
    exact = hidden.detach().double().requires_grad_()
    upstream = weights_of_rows(shape[0])
    wanted = both(semantics(exact, weight.double(), targets, None), exact, upstream.double())
    lean = both(linear_cross_entropy(hidden, weight, targets, rows=32), hidden, upstream)
    plain = both(semantics(hidden, weight, targets, None), hidden, upstream)
    assert lean[0].dtype == torch.float32 and lean[1].dtype == torch.bfloat16
    for one, other, true in zip(lean, plain, wanted, strict=True):
        error, usual = ((t.double() - true).norm().item() for t in (one, other))
        assert error <= 1.5 * usual + 1e-6 * true.norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_repeats_to_the_bit(dtype):
    hidden, weight, targets, _ = given(133, 251, 48, dtype=dtype)
    upstream = weights_of_rows(133)
    first, second = (
        both(linear_cross_entropy(hidden, weight, targets, rows=64), hidden, upstream)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("offset", [0.0, 3e4, -3e4])
def test_large_logits_and_improbable_labels(offset):
    """The largest probability rounds to 1, that of the label to 0."""
    hidden = torch.tensor([[1.0], [1.0]], dtype=torch.float32, requires_grad=True)
    weight = torch.tensor([[offset], [offset - 500.0], [offset + 8.0]])
    losses = linear_cross_entropy(hidden, weight, torch.tensor([1, 2]))
    torch.testing.assert_close(
        losses, torch.tensor([508.0 + 3.35406e-4, 3.35406e-4]), rtol=1e-7, atol=2e-7
    )
    losses.sum().backward()
    assert torch.isfinite(hidden.grad).all()


def test_what_is_not_finite_is_not_hidden():
    hidden, weight, targets, _ = given(4, 9, 3, dtype=torch.float32)
    hidden = hidden.detach().clone()
    hidden[2] = torch.inf
    losses = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    assert torch.isfinite(losses).tolist() == [True, True, False, True]


def test_no_rows_make_no_loss():
    hidden, weight, _, _ = given(0, 9, 3)
    losses = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert losses.shape == (0,)
    losses.sum().backward()
    assert hidden.grad.shape == (0, 3)


def test_a_target_that_is_no_word_is_an_error():
    hidden, weight, targets, _ = given(4, 9, 3)
    targets[1] = -100
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_head_that_trains_gets_its_gradient(which):
    hidden, weight, targets, bias = given(37, 11, 5, bias=True)
    trained = {"weight": weight, "bias": bias}[which].requires_grad_()
    made = linear_cross_entropy(hidden, weight, targets, bias).sum()
    wanted = semantics(hidden, weight, targets, bias).sum()
    for one, other in zip(
        torch.autograd.grad(made, [hidden, trained]),
        torch.autograd.grad(wanted, [hidden, trained]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_it_is_differentiable_once():
    hidden, weight, targets, _ = given(4, 9, 3)
    losses = linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad((losses**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def test_hidden_states_that_want_no_gradient_make_none():
    hidden, weight, targets, _ = given(70, 9, 3)
    for asked, number in ((hidden, 6), (hidden.detach(), 3)):
        with Products() as seen:
            linear_cross_entropy(asked, weight, targets, rows=32)
        assert seen.count == number
    with torch.no_grad(), Products() as seen:
        linear_cross_entropy(hidden, weight, targets, rows=32)
    assert seen.count == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_whole(dtype):
    """At no moment more than those of a piece live, and after the forward pass none."""
    T, V, D = 500, 3001, 24
    with FakeTensorMode():
        hidden = torch.empty(T, D, dtype=dtype, requires_grad=True)
        weight, targets = torch.empty(V, D, dtype=dtype), torch.empty(T, dtype=torch.long)
        ledger = Ledger(vocabulary=V)
        for tensor in (hidden, weight, targets):
            ledger.take(tensor)
        ledger.forget()
        with ledger:
            losses = linear_cross_entropy(hidden, weight, targets, rows=64)
            assert ledger.live == losses.nbytes + hidden.nbytes
            losses.sum().backward()
    small = 4 * T * D * dtype.itemsize + 20 * T
    assert ledger.peak <= 64 * bytes_of_a_row(weight) + small
    assert ledger.peak > 64 * V * dtype.itemsize, "the ledger has seen the logits"
    assert ledger.peak < T * V * 4 / 2


def test_how_many_rows_a_piece_has():
    with FakeTensorMode():
        small, large = torch.empty(1000, 4), torch.empty(128_256, 4, dtype=torch.bfloat16)
    rows = rows_of_a_piece(small)
    assert rows % 32 == 0
    assert BUDGET["cpu"] - 32 * 8000 < rows * 8000 <= BUDGET["cpu"]
    assert bytes_of_a_row(large) == 10 * 128_256
    assert rows_of_a_piece(large) == FEWEST
