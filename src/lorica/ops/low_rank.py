"""Singular values of a product of two thin factors, and its best factors of a smaller rank.

Legend: I in features, O out features, R rank, K the smaller rank; before them any batch dimensions.

The product itself, (O, I), is never formed. With B = Q_B R_B and A^T = Q_A R_A (thin QR),

    B A = Q_B (R_B R_A^T) Q_A^T

has the singular values of the small matrix R_B R_A^T, (R, R), whose SVD therefore gives that of the
product. The arithmetic is in float64: it is thin, and a rank is read off small singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_svd(B_OR: Tensor, A_RI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of a product of factors.

    Semantics: U, S, Vh = torch.linalg.svd(B_OR @ A_RI, full_matrices=False), the first R of each

    Returns:
        U (O, M), S (M,) from the largest down, Vh (M, I), in float64, with M = R, or fewer where a
        layer has fewer features than the rank.
    """
    Q_B, R_B = torch.linalg.qr(B_OR.detach().double())
    Q_A, R_A = torch.linalg.qr(A_RI.detach().double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT


def truncated(B_OR: Tensor, A_RI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of a smaller rank whose product is as near as any of that rank can be, in the norm of
    Frobenius and in the spectral one (Eckart and Young 1936; Mirsky 1960).

    Semantics: U, S, Vh = svd(B_OR @ A_RI); U[:, :K] * S[:K].sqrt(), S[:K, None].sqrt() * Vh[:K]

    Args:
        rank: K; where it is more than the product can have, the rest is zeros.

    Returns:
        B (O, K) and A (K, I) in the dtype of the given ones, each with the root of the singular
        values.
    """
    U, S, Vh = product_svd(B_OR, A_RI)
    root = S[..., :rank].sqrt()
    B = U[..., :rank] * root.unsqueeze(-2)
    A = root.unsqueeze(-1) * Vh[..., :rank, :]
    missing = rank - root.shape[-1]
    if missing > 0:
        B = torch.nn.functional.pad(B, (0, missing))
        A = torch.nn.functional.pad(A, (0, 0, 0, missing))
    return B.to(B_OR.dtype), A.to(A_RI.dtype)


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


def energy_rank(S: Tensor, share: float) -> int:
    """The smallest rank that keeps a share of the energy, which is the squared norm of Frobenius.

    Semantics: the smallest k with (S[:k] ** 2).sum() >= share * (S ** 2).sum()
    """
    energy = S.double().square().cumsum(-1)
    if not len(energy) or energy[-1] == 0:
        return 0
    return int((energy < share * energy[-1]).sum()) + 1
