"""Gated linear units: the activation is computed again in the backward pass instead of kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorica.ops.triton.choose import twin

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""What `gated` knows: SiLU, and GELU exactly or by its tanh."""


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """The gated activation of a feed-forward layer (Shazeer 2020, arXiv 2002.05202): SwiGLU with
    "silu", GEGLU with "gelu" or "gelu_tanh".

    Semantics: activation(gate) * up

    Keeps `gate` and `up`; plain autograd keeps activation(gate) too.
    """
    fused = twin("swiglu", gate, up) if activation == "silu" else None
    return fused(gate, up) if fused is not None else _Gated.apply(gate, up, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _activated(gate, activation).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        gate, up = ctx.saved_tensors
        d_up = _activated(gate, ctx.activation).mul_(g)
        d_gate = g * up
        if ctx.activation == "silu":
            torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        else:
            form = "tanh" if ctx.activation == "gelu_tanh" else "none"
            torch.ops.aten.gelu_backward.grad_input(
                d_gate, gate, approximate=form, grad_input=d_gate
            )
        return d_gate, d_up, None


def _activated(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
