"""Ranks of a product of thin factors, against the SVD of the product itself."""

import math

import pytest
import torch

from lorica.ops.low_rank import effective_rank, energy_rank, product_svd, truncated


def factors(out, rank, wide, *batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(*batch, out, rank, generator=generator)
    return B, torch.randn(*batch, rank, wide, generator=generator)


@pytest.mark.parametrize("shape", [(133, 12, 53), (7, 12, 41), (50, 5, 3)])
def test_the_svd_of_a_product_is_that_of_the_formed_product(shape):
    B, A = factors(*shape)
    U, S, Vh = product_svd(B, A)
    product = B.double() @ A.double()
    expected = torch.linalg.svdvals(product)[: len(S)]
    torch.testing.assert_close(S, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((U * S) @ Vh, product, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(U.mT @ U, torch.eye(len(S), dtype=U.dtype), rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 11, 12])
def test_a_truncation_is_the_nearest_product_of_its_rank(rank):
    B, A = factors(133, 12, 53)
    B_K, A_K = truncated(B, A, rank)
    assert B_K.shape == (133, rank) and A_K.shape == (rank, 53) and B_K.dtype == torch.float32
    product = B.double() @ A.double()
    U, S, Vh = torch.linalg.svd(product, full_matrices=False)
    nearest = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    torch.testing.assert_close((B_K @ A_K).double(), nearest, rtol=0, atol=2e-5)
    lost = torch.linalg.norm(product - B_K.double() @ A_K.double())
    torch.testing.assert_close(lost, S[rank:].square().sum().sqrt(), rtol=1e-4, atol=1e-4)


def test_every_expert_is_cut_by_itself():
    B, A = factors(17, 6, 11, 3)
    B_K, A_K = truncated(B, A, 2)
    for number in range(3):
        alone_B, alone_A = truncated(B[number], A[number], 2)
        torch.testing.assert_close(B_K[number] @ A_K[number], alone_B @ alone_A)


def test_more_rank_than_there_is_adds_zeros():
    B, A = factors(5, 2, 4)
    B_K, A_K = truncated(B, A, 9)
    assert B_K.shape == (5, 9) and A_K.shape == (9, 4)
    torch.testing.assert_close(B_K @ A_K, B @ A)
    assert not B_K[:, 2:].any() and not A_K[2:].any()


def test_an_update_that_never_moved_has_rank_zero():
    B, A = torch.zeros(9, 4), torch.randn(4, 7)
    S = product_svd(B, A)[1]
    assert effective_rank(S) == 0 and energy_rank(S, 0.99) == 0
    assert not (truncated(B, A, 2)[0] @ truncated(B, A, 2)[1]).any()


def test_ranks_of_known_spectra():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    two = torch.tensor([3.0, 1.0])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(two) == pytest.approx(math.exp(entropy))
    assert [energy_rank(two, share) for share in (0.5, 0.9, 0.901, 1.0)] == [1, 1, 2, 2]
    assert energy_rank(torch.ones(10), 0.9) == 9
