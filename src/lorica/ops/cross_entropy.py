"""The loss of a frozen output head, without ever holding all logits.

Legend: T rows (labelled tokens), D features, V words of the vocabulary.

A plain cross-entropy keeps the logits, their logarithms and their gradients until the backward
pass: several tables (T, V) at the very moment when all layers hold what they saved. But the loss of
a row depends on that row alone, and a frozen head has no gradient of its own. So the gradient by
the hidden states is made in the forward pass, some rows at a time, and what outlives a piece is as
wide as the hidden states (Liger Kernel, arXiv 2410.10989; Cut Cross-Entropy, arXiv 2411.09009).

    loss_t = log sum_v exp z_tv - z_t,y        dh_t = (softmax z_t - onehot y_t) W

One exponential per logit serves both: the largest probability of a row is exp(max) / sum, so the
logarithm of the sum is max - log(largest probability). It is never small (at least 1 / V), so this
loses no digits, which log(softmax) of the label would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorica.ops.triton.choose import twin

BUDGET = {"cpu": 2**27, "cuda": 2**29}
"""Bytes that the logits of a piece may take, with their copies."""

FEWEST = 256
"""Rows of a piece, however large the vocabulary: with fewer, products of matrices lose speed."""

ROWS = 32
"""Pieces are a multiple of so many rows, as the blocks of a batch are (see docs/design.md)."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    rows: int | None = None,
) -> Tensor:
    """Negative log-likelihood (nats) of one label per row under a linear head.

    Semantics: F.cross_entropy(wide(F.linear(hidden, weight, bias)), targets, reduction="none")

    Args:
        hidden: (T, D).
        weight: (V, D), in the dtype of `hidden`. One that wants a gradient gets it, by the
            Semantics line.
        targets: (T,), every one a word: rows without a label are left out before.
        bias: (V,).
        rows: of a piece; None takes as many as `BUDGET` allows, but at least `FEWEST`.

    Returns:
        (T,), in float32, or float64 where `hidden` is. It is differentiable once, by `hidden`.
    """
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and trains:
        return F.cross_entropy(_wide(F.linear(hidden, weight, bias)), targets, reduction="none")
    if (fused := twin("linear_cross_entropy", hidden, weight)) is not None:
        return fused(hidden, weight, targets, bias, rows=rows)
    rows = rows or rows_of_a_piece(weight)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _LinearCrossEntropy.apply(hidden, weight, targets, bias, rows)
    losses = hidden.new_empty(len(hidden), dtype=_wide_dtype(hidden.dtype))
    for start in range(0, len(hidden), rows):
        piece = slice(start, start + rows)
        logits = _wide(F.linear(hidden[piece], weight, bias))
        losses[piece] = F.cross_entropy(logits, targets[piece], reduction="none")
    return losses


def rows_of_a_piece(weight: Tensor) -> int:
    """Rows whose logits, with the copies made of them, fit into the budget of the device."""
    limit = BUDGET.get(weight.device.type, BUDGET["cuda"])
    fitting = limit // bytes_of_a_row(weight) // ROWS * ROWS
    return max(FEWEST, fitting)


def bytes_of_a_row(weight: Tensor) -> int:
    """Logits and their softmax; narrow logits once more in float32."""
    narrow, wide = weight.element_size(), _wide_dtype(weight.dtype).itemsize
    return len(weight) * (2 * wide if narrow == wide else 2 * wide + narrow)


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(logits: Tensor) -> Tensor:
    return logits.to(_wide_dtype(logits.dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    """Saves the gradient of the hidden states (T, D), and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        losses = hidden.new_empty(len(hidden), dtype=_wide_dtype(hidden.dtype))
        gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            losses[piece] = _differentiate(
                hidden[piece], weight, targets[piece, None], bias, out=gradient[piece]
            )
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        (gradient,) = ctx.saved_tensors
        return (gradient * g[:, None]).to(gradient.dtype), None, None, None, None


def _differentiate(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *, out: Tensor
) -> Tensor:
    """Losses (T,) of the rows of a piece; their gradients by its hidden states go into `out`."""
    logits = F.linear(hidden, weight, bias)
    of_label, largest = logits.gather(1, targets), logits.amax(1, keepdim=True)
    slope = torch.softmax(logits, 1, dtype=_wide_dtype(logits.dtype))
    losses = (_wide(largest) - _wide(of_label)) - slope.amax(1, keepdim=True).log()
    slope.scatter_add_(1, targets, losses.new_full((), -1).expand_as(losses))
    torch.mm(slope.to(logits.dtype), weight, out=out)
    return losses[:, 0]
