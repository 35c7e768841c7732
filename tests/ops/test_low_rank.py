"""The nearest thin products, against the SVD of the whole matrix."""

import math

import pytest
import torch

from lorica.ops.low_rank import (
    effective_rank,
    error_by_rank,
    factorise,
    factorise_quickly,
    rank_of_energy,
    singular_values,
    truncate,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("rows, columns, wide", [(52, 37, 11), (7, 123, 9), (5, 6, 8)])
def test_a_product_is_truncated_without_being_formed(rows, columns, wide, lead):
    A, B = drawn(*lead, wide, columns), drawn(*lead, rows, wide, seed=1)
    U, S, V = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
    for rank in (1, 4, 20):
        A_K, B_K, values = truncate(A, B, rank)
        wanted = (U[..., :rank] * S[..., None, :rank]) @ V[..., :rank, :]
        torch.testing.assert_close((B_K @ A_K).double(), wanted, atol=1e-4, rtol=1e-4)
        count = values.shape[-1]
        torch.testing.assert_close(values, S[..., :count], atol=1e-9, rtol=1e-6)
        assert A_K.dtype == B_K.dtype == torch.float32 and A_K.shape[-2] <= rank
        torch.testing.assert_close(A_K.norm(dim=-1), B_K.norm(dim=-2), atol=1e-4, rtol=1e-4)


def test_a_whole_matrix():
    W = drawn(41, 67)
    A, B, S = factorise(W, 5)
    error = error_by_rank(S)
    assert float((W - B @ A).norm() / W.norm()) == pytest.approx(float(error[5]), rel=1e-4)
    assert error[0] == 1 and float(error[-1]) == pytest.approx(0, abs=1e-6)


def test_the_randomised_one_is_nearly_as_near():
    W = drawn(300, 200) @ torch.diag(0.97 ** torch.arange(200.0)) @ drawn(200, 250, seed=2)
    _, _, S = factorise(W, 12)
    A, B, quick = factorise_quickly(W, 12, seed=4)
    best = float(error_by_rank(S)[12] * W.norm())
    assert float((W - B @ A).norm()) < 1.01 * best
    assert len(quick) == 12 and (quick <= S[:12] * (1 + 1e-5)).all()
    assert torch.equal(factorise_quickly(W, 12, seed=4)[0], A)


def test_the_rank_of_an_energy():
    S = torch.tensor([2.0, 1.0, 1.0])
    assert [rank_of_energy(S, share) for share in (0.5, 0.67, 0.84, 1.0)] == [1, 2, 3, 3]
    assert rank_of_energy(S[:1], 0.9, energy=6.0) == 2
    assert error_by_rank(torch.zeros(3)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(133, 12, 53), (7, 12, 41), (50, 5, 3)])
def test_the_singular_values_of_a_product_are_those_of_the_formed_product(shape):
    rows, wide, columns = shape
    A, B = drawn(wide, columns), drawn(rows, wide, seed=1)
    S = singular_values(A, B)
    expected = torch.linalg.svdvals(B.double() @ A.double())[: len(S)]
    torch.testing.assert_close(S, expected, rtol=1e-10, atol=1e-10)


def test_an_update_that_never_moved_has_rank_zero():
    A, B = drawn(4, 7), torch.zeros(9, 4)
    S = singular_values(A, B)
    assert effective_rank(S) == 0 and rank_of_energy(S, 0.99) == 0
    shorter_A, shorter_B, _ = truncate(A, B, 2)
    assert not (shorter_B @ shorter_A).any()


def test_the_effective_rank_of_known_spectra():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    two = torch.tensor([3.0, 1.0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(two) == pytest.approx(math.exp(entropy))
    assert [rank_of_energy(two, share) for share in (0.5, 0.9, 0.901, 1.0)] == [1, 1, 2, 2]
