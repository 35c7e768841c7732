"""The LoRA product of one linear layer, for one adapter, a mixture, or many adapters side by side.

Legend: T rows (tokens), I in features, O out features, R rank (of one adapter, or of several
stacked).

The rows of a batch are cut into segments; a segment uses one pair A, B. One adapter is one segment
over all rows. A mixture stacks the factors of its adapters and passes a gate of scale times weight,
so that the result is the exact weighted sum of the adapters' products (averaging A and B separately
would add cross terms).

The function is written by hand and not left to autograd for three reasons: the product with B is
added into the base output in place, `S = X A^T` is computed once, and the gradient of B is taken as
`(S^T g)^T`, which is 20 to 35 % cheaper for thin factors on a CPU. `S` and `dS` are always fresh
tensors: a view at an odd address lets the matrix library choose other kernels, and then training
together no longer equals training alone.
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
    """

    start: int
    end: int | None
    A_RI: Tensor
    B_OR: Tensor
    scale: float = 1.0
    gate: Tensor | None = None


def lora_linear(x: Tensor, y: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Add the LoRA product of every segment to the base output.

    Semantics: for s in segments: y[rows(s)] += ((x[rows(s)] @ s.A_RI.T) * gate(s)) @ s.B_OR.T

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
    fused = twin("lora_linear", y)
    if fused is not None and (adapted := fused(x, y, segments)) is not None:
        return adapted
    if torch.is_grad_enabled():
        factors = [t for s in segments for t in (s.A_RI, s.B_OR)]
        gates = [s.gate for s in segments]
        return _LoraLinear.apply(
            x, y, [(s.start, s.end, s.scale) for s in segments], gates, *factors
        )
    x_TI, y_TO = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for s in segments:
        _add_product(x_TI[s.start : s.end], y_TO[s.start : s.end], s.A_RI, s.B_OR, s.scale, s.gate)
    return y


def _add_product(
    x_TI: Tensor, y_TO: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, gate: Tensor | None
) -> Tensor:
    """y += scale * (x A^T) B^T in place; returns S, gated where there is a gate."""
    S_TR = (x_TI.to(y_TO.dtype) @ A_RI.to(y_TO.dtype).t()).to(y_TO.dtype)  # autocast narrows it
    if gate is not None:
        S_TR = S_TR * gate.to(S_TR.dtype)
    y_TO.addmm_(S_TR, B_OR.to(y_TO.dtype).t(), alpha=scale if gate is None else 1.0)
    return S_TR


class _LoraLinear(torch.autograd.Function):
    """Saves x (by reference, shared by all layers that read it; not where A is frozen), S, A, B;
    nothing as wide as y.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, rows: list, gates: list, *factors: Tensor
    ) -> Tensor:
        # The sum goes into the memory of y, but under a new tensor: y may be a view (a linear layer
        # with a bias returns one), and autograd does not take an in-place function of several
        # inputs on a view. Whoever saved y for a backward pass of their own is told by its version.
        out = y.data
        if not torch.compiler.is_compiling():
            increment_version(y)
        x_TI, y_TO = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        products = [
            _add_product(x_TI[a:b], y_TO[a:b], factors[2 * i], factors[2 * i + 1], scale, gates[i])
            for i, (a, b, scale) in enumerate(rows)
        ]
        keeps_x = any(ctx.needs_input_grad[4::2])  # only the gradients of A need the input
        ctx.save_for_backward(x if keeps_x else None, *factors, *products, *gates)
        ctx.rows, ctx.like_x = rows, (x.shape, x.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        n = len(ctx.rows)
        x, *saved = ctx.saved_tensors
        factors, products, gates = saved[: 2 * n], saved[2 * n : 3 * n], saved[3 * n :]
        shape, dtype = ctx.like_x
        g_TO = g.reshape(-1, g.shape[-1])
        x_TI = None if x is None else x.reshape(-1, shape[-1])
        dx_TI = None
        if ctx.needs_input_grad[0]:  # segments are disjoint; rows of none are zero
            covered = sum(len(g_TO[a:b]) for a, b, _ in ctx.rows) == len(g_TO)
            make = torch.empty if covered else torch.zeros
            dx_TI = make(len(g_TO), shape[-1], dtype=g.dtype, device=g.device)
        gradients: list[Tensor | None] = []
        for i, (a, b, scale) in enumerate(ctx.rows):
            A_RI, B_OR, S_TR, gate = factors[2 * i], factors[2 * i + 1], products[i], gates[i]
            g_seg = g_TO[a:b]
            wants_A, wants_B = ctx.needs_input_grad[4 + 2 * i : 6 + 2 * i]
            dS_TR = (g_seg @ B_OR.to(g.dtype)).to(g.dtype)
            dS_TR = dS_TR.mul_(scale) if gate is None else dS_TR.mul_(gate.to(g.dtype))
            dA = dB = None
            if wants_A:
                assert x_TI is not None
                dA = (dS_TR.t() @ x_TI[a:b].to(g.dtype)).to(A_RI.dtype)
            if wants_B:
                dB_RO = S_TR.t() @ g_seg
                dB = (dB_RO.mul_(scale) if gate is None else dB_RO).t().to(B_OR.dtype)
            if dx_TI is not None:
                torch.mm(dS_TR, A_RI.to(g.dtype), out=dx_TI[a:b])
            gradients += [dA, dB]
        dx = dx_TI.view(shape).to(dtype) if dx_TI is not None else None
        return dx, g, None, None, *gradients


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
