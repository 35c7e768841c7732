"""A linear layer with LoRA: for one adapter, a mixture, or many adapters side by side.

Legend: T rows (tokens), I in features, O out features, R rank (of one adapter, or of several
stacked).

The rows of a batch are cut into segments; a segment uses one pair A, B. One adapter is one segment
over all rows. A mixture stacks the factors of its adapters and passes a gate of scale times weight,
so that the result is the exact weighted sum of the adapters' products (averaging A and B separately
would add cross terms).

The functions are written by hand and not left to autograd for these reasons: the product with B is
added into the base output in place, and that with A into the gradient of the input, where the layer
is plain and its product is made here too; `S = x A^T` and `dS` are computed once; and they are held
transposed, (R, T), because products with a thin factor go two to nine times as fast on a CPU if the
long side lies in a row. `S` and `dS` are always fresh tensors: a view at an odd address lets the
matrix library choose other kernels, and then training together no longer equals training alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.nn import functional as F

from lorica.ops.packed import Packed, dense, input_gradient
from lorica.ops.triton.choose import twin
from lorica.ops.weight import padded


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows `start` to `end` of the flattened input, and the factors that they use.

    Attributes:
        start, end: rows of the flattened input; `end` None means to the last row.
        A_RI, B_OR: the factors.
        scale: multiplies the product. Used where `gate` is None.
        gate: scale times weight for every rank: shape (R,), or (rows of the segment, R).
        kept: the inputs that dropout leaves to A, (rows of the segment, I), bool; None: all.
        dropped: share of the inputs that `kept` leaves out on average; the others are that larger.
    """

    start: int
    end: int | None
    A_RI: Tensor
    B_OR: Tensor
    scale: float = 1.0
    gate: Tensor | None = None
    kept: Tensor | None = None
    dropped: float = 0.0


def lora_linear(x: Tensor, y: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Add the LoRA product of every segment to the output of any linear layer.

    Semantics: for s in segments: y[rows(s)] += ((x[rows(s)] @ s.A_RI.T) * gate(s)) @ s.B_OR.T

    With `kept`, x[rows(s)] there is x[rows(s)] * s.kept / (1 - s.dropped).

    Args:
        x: input of the layer, (..., I).
        y: output of the frozen layer, (..., O). It is overwritten; do not use it afterwards.
        segments: disjoint row ranges over the flattened leading dimensions.

    Returns:
        the adapted output, (..., O), in the dtype of `y`. Factors may have another dtype: they are
        cast to that of `y`, and their gradients come back in their own.
    """
    if not y.is_contiguous() or (y.is_leaf and y.requires_grad) or torch.compiler.is_compiling():
        y = y.clone(memory_format=torch.contiguous_format)
    fused = None if _drops(segments) else twin("lora_linear", y)
    if fused is not None and (adapted := fused(x, y, segments)) is not None:
        return adapted
    if torch.is_grad_enabled():
        return _LoraLinear.apply(x, y, None, None, *_arguments(segments))
    _add_products(x, y, segments)
    return y


def adapted_linear(
    x: Tensor, weight: Tensor | Packed, bias: Tensor | None, segments: Sequence[Segment]
) -> Tensor:
    """A frozen dense layer and its LoRA products in one function.

    Semantics: lora_linear(x, F.linear(x, weight, bias), segments)

    Args:
        x: (..., I), in the dtype of the weight where that is plain.
        weight: (O, I), which needs no gradient. A packed one is unpacked here, and again for the
            gradient of `x`; in between nothing of its numbers is kept.
        bias: (O,), which needs none either.
    """
    plain = x if isinstance(weight, Packed) else weight
    fused = None if _drops(segments) else twin("adapted_linear", x, plain)
    if fused is not None and (adapted := fused(x, weight, bias, segments)) is not None:
        return adapted
    if torch.is_grad_enabled():
        return _LoraLinear.apply(x, None, weight, bias, *_arguments(segments))
    y = dense(x, weight, bias)
    _add_products(x, y, segments)
    return y


def _drops(segments: Sequence[Segment]) -> bool:
    """Whether any segment has dropout, which the twins do not know."""
    return any(s.kept is not None for s in segments)


def _arguments(segments: Sequence[Segment]) -> tuple:
    """What `_LoraLinear` is given of the segments: rows, gates, what dropout keeps, factors."""
    rows = [(s.start, s.end, s.scale, s.dropped) for s in segments]
    factors = [t for s in segments for t in (s.A_RI, s.B_OR)]
    return rows, [s.gate for s in segments], [s.kept for s in segments], *factors


def _add_products(x: Tensor, y: Tensor, segments: Sequence[Segment]) -> None:
    x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for s in segments:
        seen_TI = _thinned(x_TI[s.start : s.end], s.kept, s.dropped)
        _add_product(seen_TI, y_TO[s.start : s.end], s.A_RI, s.B_OR, s.scale, s.gate)


def _thinned(rows: Tensor, kept: Tensor | None, dropped: float) -> Tensor:
    """Rows after dropout; of a gradient, what reaches them through it."""
    return rows if kept is None else rows * kept.to(rows.dtype) / (1 - dropped)


def _add_product(
    x_TI: Tensor, y_TO: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, gate: Tensor | None
) -> Tensor:
    """y += scale * (x A^T) B^T in place; returns S, (R, T), gated where there is a gate."""
    S_RT = _thin(A_RI.to(y_TO.dtype), x_TI.to(y_TO.dtype)).to(y_TO.dtype)  # autocast narrows it
    if gate is not None:
        S_RT = S_RT * _by_rank(gate).to(S_RT.dtype)
    y_TO.addmm_(S_RT.t(), B_OR.to(y_TO.dtype).t(), alpha=scale if gate is None else 1.0)
    return S_RT


def _by_rank(gate: Tensor) -> Tensor:
    """A gate (R,) or (rows, R) as (R, 1) or (R, rows), to multiply S or dS."""
    return gate.t() if gate.dim() == 2 else gate[:, None]


def _thin(thin_RI: Tensor, rows_TI: Tensor) -> Tensor:
    """thin rows^T, (R, T). Half precision on a CPU is packed by rows, so there it is the transpose
    of the other order.
    """
    if rows_TI.device.type == "cpu" and rows_TI.element_size() < 4:
        return (rows_TI @ thin_RI.t()).t()
    return thin_RI @ rows_TI.t()


class _LoraLinear(torch.autograd.Function):
    """Saves x (by reference, shared by all layers that read it; not where A is frozen), S, A, B;
    nothing as wide as the output.

    Takes either `y`, the output of the frozen layer, or the frozen layer itself: then the products
    go straight into what its own two products give.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor | None,
        weight: Tensor | Packed | None,
        bias: Tensor | None,
        rows: list,
        gates: list,
        kept: list,
        *factors: Tensor,
    ) -> Tensor:
        if y is None:
            assert weight is not None
            out = dense(x, weight, bias)
        else:
            # The sum goes into the memory of y, but under a new tensor: y may be a view (a linear
            # layer with a bias returns one), and autograd does not take an in-place function of
            # several inputs on a view. Whoever saved y for a backward pass of their own is told by
            # its version.
            out = y.data
            if not torch.compiler.is_compiling():
                increment_version(y)
        x_TI, y_TO = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        products = []
        for i, (a, b, scale, dropped) in enumerate(rows):
            seen_TI, A_RI, B_OR = _thinned(x_TI[a:b], kept[i], dropped), *factors[2 * i : 2 * i + 2]
            products.append(_add_product(seen_TI, y_TO[a:b], A_RI, B_OR, scale, gates[i]))
        keeps_x = any(ctx.needs_input_grad[7::2])  # only the gradients of A need the input
        packed = isinstance(weight, Packed)
        keeps_weight = ctx.needs_input_grad[0] and not packed
        ctx.packed = weight if packed else None
        ctx.save_for_backward(
            x if keeps_x else None,
            weight if keeps_weight else None,
            *factors,
            *products,
            *gates,
            *kept,
        )
        ctx.rows, ctx.like_x, ctx.whole = rows, (x.shape, x.dtype), y is None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        n = len(ctx.rows)
        x, weight, *saved = ctx.saved_tensors
        weight = ctx.packed if weight is None else weight
        factors, products = saved[: 2 * n], saved[2 * n : 3 * n]
        gates, kept = saved[3 * n : 4 * n], saved[4 * n :]
        shape, dtype = ctx.like_x
        g_TO = g.reshape(-1, g.shape[-1])
        x_TI = None if x is None else x.reshape(-1, shape[-1])
        dx_TI = _input_gradient(ctx, g_TO, weight) if ctx.needs_input_grad[0] else None
        gradients: list[Tensor | None] = []
        for i, (a, b, scale, dropped) in enumerate(ctx.rows):
            A_RI, B_OR, S_RT, gate = factors[2 * i], factors[2 * i + 1], products[i], gates[i]
            g_seg = g_TO[a:b]
            wants_A, wants_B = ctx.needs_input_grad[7 + 2 * i : 9 + 2 * i]
            dS_RT = _thin(B_OR.to(g.dtype).t(), g_seg).to(g.dtype)
            dS_RT = dS_RT.mul_(scale if gate is None else _by_rank(gate).to(g.dtype))
            dA = dB = None
            if wants_A:
                assert x_TI is not None
                seen_TI = _thinned(x_TI[a:b], kept[i], dropped)
                dA = (dS_RT @ seen_TI.to(g.dtype)).to(A_RI.dtype)
            if wants_B:
                dB_RO = S_RT @ g_seg
                dB = (dB_RO.mul_(scale) if gate is None else dB_RO).t().to(B_OR.dtype)
            if dx_TI is not None:
                _add_input_gradient(ctx, dx_TI[a:b], dS_RT, A_RI.to(g.dtype), kept[i], dropped)
            gradients += [dA, dB]
        dx = dx_TI.view(shape).to(dtype) if dx_TI is not None else None
        return dx, None if ctx.whole else g, None, None, None, None, None, *gradients


def _add_input_gradient(
    ctx: Any, dx_TI: Tensor, dS_RT: Tensor, A_RI: Tensor, kept: Tensor | None, dropped: float
) -> None:
    """The part of one segment, in place: beside that of the frozen layer where that is there."""
    if kept is None:
        dx_TI.addmm_(dS_RT.t(), A_RI, beta=1 if ctx.whole else 0)
        return
    part_TI = _thinned(dS_RT.t() @ A_RI, kept, dropped)
    dx_TI.copy_(dx_TI + part_TI if ctx.whole else part_TI)


def _input_gradient(ctx: Any, g_TO: Tensor, weight: Tensor | Packed | None) -> Tensor:
    """Where the gradient of the input is summed up, with the part of the frozen layer in it if that
    is made here. Segments are disjoint; rows of none are zero without it.
    """
    if ctx.whole:
        assert weight is not None
        return input_gradient(g_TO, weight)
    covered = sum(len(g_TO[a:b]) for a, b, *_ in ctx.rows) == len(g_TO)
    make = torch.empty if covered else torch.zeros
    return make(len(g_TO), ctx.like_x[0][-1], dtype=g_TO.dtype, device=g_TO.device)


def lora_embedding(
    ids: Tensor, y: Tensor, A_RV: Tensor, B_OR: Tensor, scale: float | Tensor
) -> Tensor:
    """Add the LoRA product of an embedding layer.

    Semantics: y + F.embedding(ids, A_RV.T) @ B_OR.T * scale

    Args:
        ids: token ids, (...).
        y: output of the frozen layer, (..., O).
        A_RV: (R, vocabulary); B_OR: (O, R).
    """
    S = F.embedding(ids, A_RV.t()).to(y.dtype)
    return y + (S @ B_OR.to(y.dtype).t()) * scale


def lora_conv(
    x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float, geometry: dict[str, Any]
) -> Tensor:
    """Add the LoRA product of a convolution: a convolution to R channels, then a 1 x 1 convolution.

    Semantics: y + conv(conv(x, A, **geometry), B, groups=groups) * scale

    Args:
        x: (batch, channels, ...) or unbatched.
        A: (R, in channels, *kernel): never grouped. B: (out channels, R / groups, 1, ...).
        geometry: stride, padding, dilation, groups, padding_mode and the padding of that mode.
    """
    convolve = {3: F.conv1d, 4: F.conv2d}[A.dim()]
    x, padding = padded(x.to(y.dtype), geometry)
    S = convolve(
        x, A.to(y.dtype), stride=geometry["stride"], padding=padding, dilation=geometry["dilation"]
    )
    return y + convolve(S, B.to(y.dtype), groups=geometry["groups"]) * scale
