"""LoftQ: the start of LoRA from what quantization takes away from the weight.

    repeat:  Q = NF4(W - s B A);   s B A = the best product of rank r for W - Q

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models"
(arXiv 2310.08659), algorithm 1. There Q takes the place of the weight. Here the base stays as it
is: Q is only simulated, and as with every start from parts of the weight the first product is
subtracted, so that the adapter begins as the identity. What is kept of the method is the start: the
directions in which rounding to NF4 hurts most.

On a base that is quantized indeed, Q is the base's own weight and stays that: then the adapter
begins with W - Q as far as its rank holds it, and makes up for a part of the rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.ops.nf4 import nf4_rounded


def loftq(matrix: Tensor, r: int, scale: float, iterations: int = 1) -> tuple[Tensor, Tensor]:
    """Matrix (..., O, I) -> A (..., r, I), B (..., O, r), whose product times `scale` is W - Q."""
    matrix = matrix.float()
    A = B = torch.zeros(())
    rest = matrix
    for _ in range(iterations):
        rounded = nf4_rounded(rest.contiguous())
        A, B = closest(matrix - rounded, r, scale)
        rest = matrix - scale * (B @ A)
    return A, B


def closest(matrix: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """The factors A (..., r, I), B (..., O, r) whose product times `scale` is nearest to a matrix
    (..., O, I).
    """
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (S[..., :r] / scale).sqrt()
    return root.unsqueeze(-1) * Vh[..., :r, :], U[..., :r] * root.unsqueeze(-2)
