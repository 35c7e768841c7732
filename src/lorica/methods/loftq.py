"""LoftQ: the start of LoRA from what quantization takes away from the weight.

    repeat:  Q = NF4(W - s B A);   s B A = the best product of rank r for W - Q

Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models"
(arXiv 2310.08659), algorithm 1. There Q takes the place of the weight. Here the base stays as it
is: Q is only simulated, and as with every start from parts of the weight the first product is
subtracted, so that the adapter begins as the identity. What is kept of the method is the start: the
directions in which rounding to NF4 hurts most.
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
        U, S, Vh = torch.linalg.svd(matrix - rounded, full_matrices=False)
        root = (S[..., :r] / scale).sqrt()
        A, B = root.unsqueeze(-1) * Vh[..., :r, :], U[..., :r] * root.unsqueeze(-2)
        rest = matrix - scale * (B @ A)
    return A, B
