"""The nearest products of two thin factors: of a product of wider ones, and of a whole matrix.

Legend: I in features, O out features, R rank, K the smaller rank; before them any batch dimensions.

The product of factors, (O, I), is never formed. With B = Q_B R_B and A^T = Q_A R_A (thin QR),

    B A = Q_B (R_B R_A^T) Q_A^T

has the singular values of the small matrix R_B R_A^T, (R, R), whose SVD therefore gives that of the
product. It is thin, so it is done in float64.

No factors of rank K are nearer, in the norm of Frobenius and in the spectral one, than those of the
first K singular values, and the error is what the others hold (Eckart and Young 1936; Mirsky 1960).
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSAMPLING, ITERATIONS = 16, 3
"""Of the randomised SVD: so many directions more than are wanted, and products with W W^T."""


def truncate(A_RI: Tensor, B_OR: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest factors of a smaller rank of a product, without forming it.

    Semantics: U, S, V = svd(B_OR @ A_RI); (S[:K].sqrt() * V[:K], U[:, :K] * S[:K].sqrt(), S)

    Args:
        rank: K; more than the product can have is cut to that.

    Returns:
        A (K, I) and B (O, K) in the dtype of the given ones, each with the root of the singular
        values, and all singular values of the product, float64, from the largest down.
    """
    Q_B, R_B = torch.linalg.qr(B_OR.double())
    Q_A, R_A = torch.linalg.qr(A_RI.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    A, B = _balanced(Q_B @ U, S, Vh @ Q_A.mT, rank)
    return A.to(A_RI.dtype), B.to(B_OR.dtype), S


def singular_values(A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """All singular values that a product of factors can have, float64, from the largest down.

    Semantics: torch.linalg.svdvals(B_OR @ A_RI), the first R of them
    """
    R_B = torch.linalg.qr(B_OR.double(), mode="r").R
    R_A = torch.linalg.qr(A_RI.double().mT, mode="r").R
    return torch.linalg.svdvals(R_B @ R_A.mT)


def effective_rank(S: Tensor) -> float:
    """How many directions a spectrum really has: the exponential of its entropy.

    Semantics: p = S / S.sum(); exp(-(p * log(p)).sum()), 0 where all of S is 0

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    total = S.sum()
    if total == 0:
        return 0.0
    shares = S[S > 0].double() / total
    return float(torch.exp(-(shares * shares.log()).sum()))


def factorise(W_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest factors of a whole matrix, by its exact SVD.

    Semantics: U, S, V = svd(W_OI); (S[:K].sqrt() * V[:K], U[:, :K] * S[:K].sqrt(), S)

    Returns:
        as `truncate`, in float32 or wider.
    """
    U, S, Vh = torch.linalg.svd(_wide(W_OI), full_matrices=False)
    return *_balanced(U, S, Vh, rank), S.double()


def factorise_quickly(W_OI: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Nearly the nearest factors of a whole matrix, by a randomised SVD: some products with thin
    matrices instead of a decomposition of all of it (Halko, Martinsson and Tropp 2011, "Finding
    structure with randomness", arXiv 0909.4061, algorithms 4.4 and 5.1).

    Returns:
        as `factorise`, with the first `rank` singular values; they are no larger than the true
        ones.
    """
    W = _wide(W_OI)
    size = min(rank + OVERSAMPLING, *W.shape[-2:])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*W.shape[:-2], W.shape[-1], size, generator=generator)
    Q = torch.linalg.qr(W @ drawn.to(W)).Q
    for _ in range(ITERATIONS):
        Q = torch.linalg.qr(W.mT @ Q).Q
        Q = torch.linalg.qr(W @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
    return *_balanced(Q @ U, S, Vh, rank), S[..., :rank].double()


def error_by_rank(S: Tensor, energy: float | None = None) -> Tensor:
    """The relative error in the norm of Frobenius when only the first k values are kept, for k = 0
    to all: sqrt(sum_{i>k} s_i^2 / energy).

    Args:
        energy: squared norm of the whole, where `S` does not hold all of it.
    """
    squares = S.double().square()
    whole = float(squares.sum()) if energy is None else energy
    kept = torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    return ((whole - kept).clamp_min(0) / whole).sqrt() if whole > 0 else torch.zeros_like(kept)


def rank_of_energy(S: Tensor, share: float, energy: float | None = None) -> int:
    """The smallest rank that holds so much of the energy, which is the sum of the squared singular
    values; one more than there are values where `S` does not hold enough.
    """
    errors = error_by_rank(S, energy).square()
    enough = (errors <= 1 - share + 1e-12).nonzero()
    return int(enough[0]) if len(enough) else len(S) + 1


def _balanced(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    root = S[..., :rank].sqrt()
    A = root.unsqueeze(-1) * Vh[..., :rank, :]
    return A.contiguous(), (U[..., :rank] * root.unsqueeze(-2)).contiguous()


def _wide(W: Tensor) -> Tensor:
    return W if W.dtype == torch.float64 else W.float()
