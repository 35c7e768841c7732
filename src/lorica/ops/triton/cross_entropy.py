"""The loss of a frozen output head on CUDA: logits never whole, the gradient made going forward.

The rows are taken in chunks. A chunk's logits are a matrix product; one kernel reads them twice,
writes the losses, and writes softmax minus one-hot over them; a second product gives the gradient
of the hidden states. That is 4 T V D operations and no gradient of the head, where plain autograd
needs 4 T V D too but keeps the logits and their float32 softmax (6 to 12 bytes for each of T V).

Legend: T rows, D width of the hidden states, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorica.ops.triton.launch import block, launch

IGNORED = -100
CHUNK_BYTES = 2**28
"""Logits that exist at one time. A chunk is still thousands of rows high at a vocabulary of 32k."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    rows: int | None = None,
) -> Tensor:
    """Negative log-likelihood (nats) of one label per row under a linear head.

    Semantics: F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")

    Args:
        hidden: (T, D).
        weight: (V, D) of the frozen head. bias: (V,), frozen.
        targets: (T,), int64; rows of -100 have loss 0 and no gradient.
        rows: of a chunk; None takes as many as CHUNK_BYTES allow, a multiple of 32.

    Returns:
        (T,), float32.
    """
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    assert not (torch.is_grad_enabled() and trains), "the head is not frozen"
    fitting = CHUNK_BYTES // (weight.shape[0] * hidden.element_size()) // 32 * 32
    return _LinearCrossEntropy.apply(hidden, weight, targets, bias, rows or max(32, fitting))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, rows: int
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        losses_T = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight, bias)
            _losses(logits, targets[part], losses_T[part], gradient=wanted)
            if dhidden is not None:
                dhidden[part] = logits @ weight
        ctx.save_for_backward(dhidden)
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        (dhidden,) = ctx.saved_tensors
        return (dhidden * g[:, None]).to(dhidden.dtype), None, None, None, None


def _losses(logits: Tensor, targets: Tensor, losses: Tensor, *, gradient: bool) -> None:
    """Fill in `losses`; with `gradient`, overwrite the logits with their gradient."""
    rows, width = logits.shape
    launch(
        _loss_rows,
        (rows,),
        logits, targets.contiguous(), losses, width, logits.stride(0),
        MISSING=IGNORED, BLOCK=block(width, 4096), GRADIENT=gradient,
    )  # fmt: skip


@triton.jit
def _loss_rows(
    logits, targets, losses, width, row_stride,
    MISSING: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """One program per row: the running maximum and sum of exponentials, then the softmax."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    logits += row * row_stride
    largest = -3.0e38  # finite: a block of -inf is then no difference of infinities
    total = 0.0
    chosen = 0.0
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(z - higher), axis=0)
        chosen += tl.sum(tl.where(column == target, z, 0.0), axis=0)
        largest = higher
    logsumexp = largest + tl.log(total)
    kept = target != MISSING
    tl.store(losses + row, tl.where(kept, logsumexp - chosen, 0.0))
    if GRADIENT:
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < width
            z = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
            d = tl.exp(z - logsumexp) - tl.where(column == target, 1.0, 0.0)
            d = tl.where(kept, d, 0.0)
            tl.store(logits + column, d.to(logits.dtype.element_ty), mask=inside)
