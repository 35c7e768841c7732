"""Rotary position embedding that makes each half of a head in two passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of every head by the angles of its position (Su et al. 2021, RoFormer,
    arXiv 2104.09864, in the layout of GPT-NeoX and Llama).

    Semantics: x * cos + cat(-x[..., D/2:], x[..., :D/2], -1) * sin

    Args:
        x: (..., D).
        cos, sin: broadcast against `x`. They get no gradient.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (sin_low, sin_high) = sin.chunk(2, -1)
        return _turned(x, cos, -1, sin_low, 1, sin_high)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        cos, sin = ctx.saved_tensors
        (sin_low, sin_high) = sin.chunk(2, -1)
        return _turned(g, cos, 1, sin_high, -1, sin_low), None, None


def _turned(x: Tensor, cos: Tensor, a: int, to_low: Tensor, b: int, to_high: Tensor) -> Tensor:
    """x * cos + cat(a * to_low * high half of x, b * to_high * low half of x, -1)."""
    first, second = x.chunk(2, -1)
    out = torch.mul(x, cos)  # keeps the strides: a transposed view stays one
    low, high = out.chunk(2, -1)
    low.addcmul_(second, to_low, value=a)
    high.addcmul_(first, to_high, value=b)
    return out
