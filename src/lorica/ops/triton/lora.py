"""A linear layer with LoRA on CUDA: many adapters in one launch, gradients in one reading.

Two things are gained over the torch path. Several segments share every kernel, where the torch path
starts five products for each. And dS and the gradient of B come out of one reading of the gradient
of the output, the widest tensor there is, which the torch path reads twice. The forward products of
a single segment are left to torch: `addmm_` moves no byte more than a kernel of ours would.

Legend: T rows (tokens), I in features, O out features, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from lorica.ops.lora import Segment
from lorica.ops.packed import Packed, dense, input_gradient
from lorica.ops.triton.launch import rows_of
from lorica.ops.triton.lora_kernels import (
    FUSED_RANK,
    HIGH,
    LOW,
    TALL,
    Tiles,
    cut,
    expand,
    outer,
    per_segment,
    shrink,
)

HIGHEST_RANK = 64
"""Above it the products are no longer thin, and torch's are as good."""


def lora_linear(x: Tensor, y: Tensor, segments: Sequence[Segment]) -> Tensor | None:
    """Add the LoRA product of every segment to the base output; see `ops.lora.lora_linear`.

    Semantics: for s in segments: y[rows(s)] += ((x[rows(s)] @ s.A_RI.T) * gate(s)) @ s.B_OR.T

    Args:
        x: (..., I). y: (..., O), contiguous; it is overwritten. segments: disjoint row ranges.

    Returns:
        (..., O), or None where nothing is gained (y is then as it was).
    """
    return _apply(x, y, None, None, segments) if _pays(segments) else None


def adapted_linear(
    x: Tensor, weight: Tensor | Packed, bias: Tensor | None, segments: Sequence[Segment]
) -> Tensor | None:
    """A frozen dense layer and its LoRA products in one function.

    Semantics: lora_linear(x, F.linear(x, weight, bias), segments)

    Here the products with A are added into the gradient of the input where the layer itself leaves
    it, so that it is not read and written once more.

    Args:
        x: (..., I), in the dtype of the weight. weight: (O, I) and bias: (O,), frozen.

    Returns:
        (..., O), or None where nothing is gained.
    """
    return _apply(x, None, weight, bias, segments) if _pays(segments) else None


def _pays(segments: Sequence[Segment]) -> bool:
    """Whether several segments share a launch, or a single one saves a reading."""
    if len(segments) == 1:
        (one,) = segments
        return torch.is_grad_enabled() and one.B_OR.requires_grad and len(one.A_RI) <= FUSED_RANK
    return bool(segments) and max(len(s.A_RI) for s in segments) <= HIGHEST_RANK


def _apply(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | Packed | None,
    bias: Tensor | None,
    segments: Sequence[Segment],
) -> Tensor:
    rows = x.shape[:-1].numel()
    spans = tuple(slice(s.start, s.end).indices(rows)[:2] for s in segments)
    scales = tuple(s.scale if s.gate is None else 1.0 for s in segments)
    factors = [t for s in segments for t in (s.A_RI, s.B_OR)]
    gates = [s.gate for s in segments]
    return _LoraLinear.apply(x, y, weight, bias, spans, scales, gates, *factors)


@dataclass(frozen=True, eq=False)
class Parts:
    """The segments as the kernels take them.

    Attributes:
        spans: first row and row after the last of every segment.
        scales: 1 where there is a gate.
        gates: None, (R,) or (rows of the segment, R).
        factors: A and B of every segment in turn.
    """

    spans: tuple[tuple[int, int], ...]
    scales: tuple[float, ...]
    gates: Sequence[Tensor | None]
    factors: Sequence[Tensor]

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(len(A) for A in self.factors[::2])

    def tiles(self, height: int, device: torch.device) -> Tiles:
        return cut(self.spans, self.ranks, height, device)

    def scale(self, device: torch.device) -> Tensor:
        return per_segment(self.scales, device)

    def ones(self, device: torch.device) -> Tensor:
        return per_segment((1.0,) * len(self.spans), device)

    def stacked_A(self, dtype: torch.dtype) -> Tensor:
        """(sum of ranks, I)"""
        return torch.cat([*self.factors[::2]]).to(dtype)

    def stacked_B(self, dtype: torch.dtype) -> Tensor:
        """(sum of ranks, O): transposed."""
        return torch.cat([B.t() for B in self.factors[1::2]]).to(dtype)

    def gate(self, S_TR: Tensor) -> None:
        """Multiply the ranks of every segment that has a gate with it, in place."""
        for (start, end), gate in zip(self.spans, self.gates, strict=True):
            if gate is not None:
                S_TR[start:end, : gate.shape[-1]] *= gate.to(S_TR.dtype)

    def alone(self) -> "Parts":
        """A single segment over its own rows."""
        ((start, end),) = self.spans
        return Parts(((0, end - start),), self.scales, self.gates, self.factors)


class _LoraLinear(torch.autograd.Function):
    """Saves what that of `ops.lora` saves: x by reference (not where every A is frozen), S, and the
    factors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | Packed | None,
        bias: Tensor | None,
        spans: tuple,
        scales: tuple,
        gates: list,
        *factors: Tensor,
    ) -> Tensor:
        if y is None:
            assert weight is not None
            out = dense(x, weight, bias)
        else:
            out = y.data  # as in ops.lora: y may be a view, which must not be overwritten as such
            increment_version(y)
        x_TI, y_TO = rows_of(x.to(out.dtype)), out.view(-1, out.shape[-1])
        add = _add_one if len(spans) == 1 else _add_many
        S_TR = add(x_TI, y_TO, Parts(spans, scales, gates, factors))
        keeps_x = any(ctx.needs_input_grad[7::2])
        packed = isinstance(weight, Packed)
        keeps_weight = ctx.needs_input_grad[0] and not packed
        ctx.packed = weight if packed else None
        ctx.save_for_backward(
            x if keeps_x else None, weight if keeps_weight else None, S_TR, *factors, *gates
        )
        ctx.given, ctx.whole = (spans, scales, x.shape, x.dtype), y is None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        spans, scales, shape, dtype = ctx.given
        x, weight, S_TR, *saved = ctx.saved_tensors
        weight = ctx.packed if weight is None else weight
        parts = Parts(spans, scales, saved[2 * len(spans) :], saved[: 2 * len(spans)])
        wants, g_TO, dx_TI = ctx.needs_input_grad[7:], rows_of(g), None
        if ctx.needs_input_grad[0]:  # rows of no segment have the layer's own gradient, or none
            zeros = (len(g_TO), shape[-1])
            dx_TI = input_gradient(g_TO, weight) if ctx.whole else g_TO.new_zeros(zeros)
        found = (_gradients_of_one if len(spans) == 1 else _gradients_of_many)(
            None if x is None else rows_of(x.to(g.dtype)),
            g_TO,
            S_TR.to(g.dtype) if any(wants[1::2]) else None,
            parts,
            dx_TI,
        )
        gradients = [
            t.to(factor.dtype) if want and t is not None else None
            for t, want, factor in zip(found, wants, parts.factors, strict=True)
        ]
        dx = None if dx_TI is None else dx_TI.view(shape).to(dtype)
        return dx, None if ctx.whole else g, None, None, None, None, None, *gradients


# --- one segment ----------------------------------------------------------------------------------


def _add_one(x_TI: Tensor, y_TO: Tensor, parts: Parts) -> Tensor:
    """y += scale * S B^T in the rows of the segment; returns its S, gated: (its rows, R)."""
    ((start, end),), (A_RI, B_OR), dtype = parts.spans, parts.factors, y_TO.dtype
    S_TR = (x_TI[start:end] @ A_RI.to(dtype).t()).to(dtype)  # autocast may narrow it
    parts.alone().gate(S_TR)
    y_TO[start:end].addmm_(S_TR, B_OR.to(dtype).t(), alpha=parts.scales[0])
    return S_TR


def _gradients_of_one(
    x_TI: Tensor | None, g_TO: Tensor, S_TR: Tensor | None, parts: Parts, dx_TI: Tensor | None
) -> list[Tensor | None]:
    """The gradients of A and B; what A adds to the gradient of x is added to `dx`."""
    ((start, end),), A_RI, alone = parts.spans, parts.factors[0], parts.alone()
    dS_TR, dB_GRO = _down_and_outer(g_TO[start:end], S_TR, alone)
    dS_TR = dS_TR[:, : len(A_RI)].contiguous()
    alone.gate(dS_TR)
    dA = None if x_TI is None else dS_TR.t() @ x_TI[start:end]
    if dx_TI is not None:
        dx_TI[start:end].addmm_(dS_TR, A_RI.to(g_TO.dtype))
    return [dA, None if dB_GRO is None else dB_GRO[0, : len(A_RI)].t()]


# --- several segments -----------------------------------------------------------------------------


def _add_many(x_TI: Tensor, y_TO: Tensor, parts: Parts) -> Tensor:
    """y += scale * S B^T in the rows of every segment; returns S, gated: (T, R)."""
    dtype, device = y_TO.dtype, y_TO.device
    tiles = parts.tiles(LOW, device)
    S_TR, _ = shrink(x_TI, parts.stacked_A(dtype), tiles, parts.ones(device))
    parts.gate(S_TR)
    expand(S_TR, parts.stacked_B(dtype), y_TO, tiles, parts.scale(device), add=True)
    return S_TR


def _gradients_of_many(
    x_TI: Tensor | None, g_TO: Tensor, S_TR: Tensor | None, parts: Parts, dx_TI: Tensor | None
) -> list[Tensor | None]:
    """The gradients of every A and B in turn; what they add to that of x is added to `dx`."""
    dA_GRI, device = None, g_TO.device
    dS_TR, dB_GRO = _down_and_outer(g_TO, S_TR, parts)
    parts.gate(dS_TR)
    if x_TI is not None:
        dA_GRI = outer(dS_TR, x_TI, parts.tiles(TALL, device), parts.ones(device))
    if dx_TI is not None:
        stacked, tiles = parts.stacked_A(g_TO.dtype), parts.tiles(LOW, device)
        expand(dS_TR, stacked, dx_TI, tiles, parts.ones(device), add=True)
    gradients: list[Tensor | None] = []
    for i, rank in enumerate(parts.ranks):
        gradients.append(None if dA_GRI is None else dA_GRI[i, :rank])
        gradients.append(None if dB_GRO is None else dB_GRO[i, :rank].t())
    return gradients


def _down_and_outer(
    g_TO: Tensor, S_TR: Tensor | None, parts: Parts
) -> tuple[Tensor, Tensor | None]:
    """dS, and where S is given the gradients of every B: in one reading of g if ranks allow it."""
    stacked, device = parts.stacked_B(g_TO.dtype), g_TO.device
    scale = parts.scale(device)
    if S_TR is not None and max(parts.ranks) <= FUSED_RANK:
        tiles = parts.tiles(HIGH, device)
        return shrink(g_TO, stacked, tiles, scale, S_TR=S_TR, outer_scales=scale)
    dS_TR, _ = shrink(g_TO, stacked, parts.tiles(LOW, device), scale)
    if S_TR is None:
        return dS_TR, None
    return dS_TR, outer(S_TR, g_TO, parts.tiles(TALL, device), scale)
