"""Gated linear units: the activation is computed again in the backward pass instead of kept.

torch cuts an elementwise function into as many stretches as there are threads, and computes what
is left over at the end of each, too short for the vector unit, by other code: SiLU and GELU by its
tanh round otherwise there. Where the cuts fall depends on all rows, so rows that must not depend on
what lies beside them (`sizes`) are given to the function by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorica.ops.triton.choose import twin

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""What `gated` knows: SiLU, and GELU exactly or by its tanh."""


def gated(
    gate: Tensor, up: Tensor, activation: str = "silu", *, sizes: Sequence[int] = ()
) -> Tensor:
    """The gated activation of a feed-forward layer (Shazeer 2020, arXiv 2002.05202): SwiGLU with
    "silu", GEGLU with "gelu" or "gelu_tanh".

    Semantics: activation(gate) * up

    Keeps `gate` and `up`; plain autograd keeps activation(gate) too.

    Args:
        gate, up: (..., D).
        sizes: rows of blocks that come out, on a CPU, to the bits that they have alone; empty: all
            rows are one.
    """
    fused = twin("swiglu", gate, up) if activation == "silu" else None
    return fused(gate, up) if fused is not None else _Gated.apply(gate, up, activation, sizes)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, activation: str, sizes: Sequence[int]
    ) -> Tensor:
        gate = gate.contiguous() if sizes else gate
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.sizes = activation, sizes
        return _activated(gate, activation, sizes).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        gate, up = ctx.saved_tensors
        d_up = _activated(gate, ctx.activation, ctx.sizes).mul_(g)
        d_gate = torch.mul(g.contiguous() if ctx.sizes else g, up)
        for slope, own in zip(_parts(d_gate, ctx.sizes), _parts(gate, ctx.sizes), strict=True):
            if ctx.activation == "silu":
                torch.ops.aten.silu_backward.grad_input(slope, own, grad_input=slope)
            else:
                form = "tanh" if ctx.activation == "gelu_tanh" else "none"
                torch.ops.aten.gelu_backward.grad_input(
                    slope, own, approximate=form, grad_input=slope
                )
        return d_gate, d_up, None, None


def _activated(gate: Tensor, activation: str, sizes: Sequence[int]) -> Tensor:
    out = torch.empty_like(gate)
    for own, made in zip(_parts(gate, sizes), _parts(out, sizes), strict=True):
        if activation == "silu":
            torch.ops.aten.silu.out(own, out=made)
        else:
            form = "tanh" if activation == "gelu_tanh" else "none"
            torch.ops.aten.gelu.out(own, approximate=form, out=made)
    return out


def _parts(rows: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Views of the blocks, where there are any."""
    return rows.view(-1, rows.shape[-1]).split(list(sizes)) if sizes else (rows,)
