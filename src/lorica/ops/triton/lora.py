"""The LoRA products of a linear layer on CUDA: many adapters in a launch, gradients in one reading.

`grouped_lora` is `ops.lora.lora_linear` for several segments: a kernel for all of them where the
torch path starts two products for each. `lora_gradients` is what a single segment profits from: it
makes dS and the gradient of B out of one reading of the output's gradient, which the torch path
reads twice. The forward products of a single segment are left to torch: `addmm_` moves no byte more
than a kernel of ours would.

Legend: T rows (tokens), I in features, O out features, R rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from lorica.ops.lora import Segment
from lorica.ops.triton.launch import rows_of
from lorica.ops.triton.lora_kernels import (
    FUSED_RANK,
    HIGH,
    LOW,
    TALL,
    cut,
    expand,
    outer,
    per_segment,
    shrink,
)

HIGHEST_RANK = 64
"""Above it the products are no longer thin, and torch's are as good."""


def grouped_lora(x: Tensor, y: Tensor, segments: Sequence[Segment]) -> Tensor | None:
    """Add the LoRA product of every segment to the base output; see `ops.lora.lora_linear`.

    Semantics: for s in segments: y[rows(s)] += ((x[rows(s)] @ s.A_RI.T) * gate(s)) @ s.B_OR.T

    Args:
        x: (..., I). y: (..., O), contiguous; it is overwritten. segments: disjoint row ranges.

    Returns:
        (..., O), or None where this brings nothing: a single segment, or a rank above HIGHEST_RANK.
    """
    if len(segments) < 2 or max(len(s.A_RI) for s in segments) > HIGHEST_RANK:
        return None
    rows = y.shape[:-1].numel()
    spans = tuple(slice(s.start, s.end).indices(rows)[:2] for s in segments)
    scales = tuple(s.scale if s.gate is None else 1.0 for s in segments)
    factors = [t for s in segments for t in (s.A_RI, s.B_OR)]
    return _GroupedLora.apply(x, y, spans, scales, [s.gate for s in segments], *factors)


class _GroupedLora(torch.autograd.Function):
    """Saves x by reference (not where every A is frozen), S and the factors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, spans: tuple, scales: tuple, gates: list, *factors: Tensor
    ) -> Tensor:
        out = y.data  # as in ops.lora: y may be a view, which autograd does not let be overwritten
        increment_version(y)
        x_TI, y_TO = rows_of(x.to(y.dtype)), out.view(-1, out.shape[-1])
        ranks = tuple(len(A) for A in factors[::2])
        tiles = cut(spans, ranks, LOW, y.device)
        ones, scale = _ones(spans, y), per_segment(scales, y.device)
        S_TR, _ = shrink(x_TI, _stacked_A(factors, y.dtype), tiles, ones)
        _gate(S_TR, spans, gates)
        expand(S_TR, _stacked_B(factors, y.dtype), y_TO, tiles, scale, add=True)
        keeps_x = any(ctx.needs_input_grad[5::2])
        ctx.save_for_backward(x if keeps_x else None, S_TR, *factors, *gates)
        ctx.given = spans, scales, ranks, x.shape, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        spans, scales, ranks, shape, dtype = ctx.given
        x, S_TR, *saved = ctx.saved_tensors
        factors, gates = saved[: 2 * len(ranks)], saved[2 * len(ranks) :]
        wants_A, wants_B = ctx.needs_input_grad[5::2], ctx.needs_input_grad[6::2]
        g_TO, scale, ones = rows_of(g), per_segment(scales, g.device), _ones(spans, g)
        dS_TR, dB_GRO = _down_and_outer(g_TO, factors, S_TR if any(wants_B) else None, spans, scale)
        _gate(dS_TR, spans, gates)
        dA_GRI = dx = None
        if x is not None:
            tall = cut(spans, ranks, TALL, g.device)
            dA_GRI = outer(dS_TR, rows_of(x.to(g.dtype)), tall, ones)
        if ctx.needs_input_grad[0]:  # rows of no segment are zero
            dx_TI = torch.zeros(len(g_TO), shape[-1], dtype=g.dtype, device=g.device)
            low = cut(spans, ranks, LOW, g.device)
            expand(dS_TR, _stacked_A(factors, g.dtype), dx_TI, low, ones, add=False)
            dx = dx_TI.view(shape).to(dtype)
        gradients: list[Tensor | None] = []
        for i, rank in enumerate(ranks):
            A, B = factors[2 * i], factors[2 * i + 1]
            gradients.append(
                dA_GRI[i, :rank].to(A.dtype) if dA_GRI is not None and wants_A[i] else None
            )
            gradients.append(
                dB_GRO[i, :rank].t().to(B.dtype) if dB_GRO is not None and wants_B[i] else None
            )
        return dx, g, None, None, None, *gradients


def _down_and_outer(
    g_TO: Tensor, factors: Sequence[Tensor], S_TR: Tensor | None, spans: tuple, scale: Tensor
) -> tuple[Tensor, Tensor | None]:
    """dS, and where S is given the gradients of every B: in one reading of g if ranks allow it."""
    ranks = tuple(len(A) for A in factors[::2])
    stacked, S_TR = _stacked_B(factors, g_TO.dtype), None if S_TR is None else S_TR.to(g_TO.dtype)
    low, high, tall = (cut(spans, ranks, height, g_TO.device) for height in (LOW, HIGH, TALL))
    if S_TR is None:
        return shrink(g_TO, stacked, low, scale)
    if high.widest <= FUSED_RANK:
        return shrink(g_TO, stacked, high, scale, S_TR=S_TR, outer_scales=scale)
    return shrink(g_TO, stacked, low, scale)[0], outer(S_TR, g_TO, tall, scale)


def lora_gradients(
    g_TO: Tensor, B_OR: Tensor, S_TR: Tensor, scale: float
) -> tuple[Tensor, Tensor] | None:
    """The gradients of S and of B from one reading of the gradient of the output.

    Semantics: scale * g @ B, scale * g.T @ S

    Args:
        g_TO: (T, O). B_OR: (O, R). S_TR: (T, R), what was multiplied with B.

    Returns:
        (T, R) in the dtype of g, (O, R) in float32; None where the rank is above FUSED_RANK, and
        torch's two products read less.
    """
    rank = B_OR.shape[1]
    if rank > FUSED_RANK:
        return None
    tiles = cut(((0, len(g_TO)),), (rank,), HIGH, g_TO.device)
    scales = per_segment((scale,), g_TO.device)
    S_TR = rows_of(S_TR.to(g_TO.dtype))
    dS_TR, dB_GRO = shrink(
        rows_of(g_TO), B_OR.to(g_TO.dtype).t(), tiles, scales, S_TR=S_TR, outer_scales=scales
    )
    assert dB_GRO is not None
    return dS_TR[:, :rank].contiguous(), dB_GRO[0, :rank].t()


def _stacked_A(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(sum of ranks, I)"""
    return torch.cat([A.to(dtype) for A in factors[::2]])


def _stacked_B(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(sum of ranks, O): transposed."""
    return torch.cat([B.to(dtype).t() for B in factors[1::2]])


def _ones(spans: tuple, like: Tensor) -> Tensor:
    return per_segment((1.0,) * len(spans), like.device)


def _gate(S_TR: Tensor, spans: tuple, gates: Sequence[Tensor | None]) -> None:
    """Multiply the ranks of every segment that has a gate with it, in place."""
    for (start, end), gate in zip(spans, gates, strict=True):
        if gate is not None:
            S_TR[start:end, : gate.shape[-1]] *= gate.to(S_TR.dtype)
