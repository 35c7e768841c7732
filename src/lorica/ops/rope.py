"""Rotary position embedding that makes each half of a head in two passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorica.ops.triton.choose import twin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of every head by the angles of its position (Su et al. 2021, RoFormer,
    arXiv 2104.09864, in the layout of GPT-NeoX and Llama).

    Semantics: x * cos + cat(-x[..., D/2:], x[..., :D/2], -1) * sin

    Args:
        x: (..., D).
        cos, sin: broadcast against `x`. They get no gradient.
    """
    return _Rotate.apply(x, cos, sin)


def rotate_both(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys, in the signature that modelling code gives its own function.

    Args:
        q, k: (N, H, T, D), or (N, T, H, D) with `unsqueeze_dim` 2. Where the angles are fewer than
            the features of a head, its last features rest.
        cos, sin: (N, T, D) or narrower.
    """
    whole = cos.shape[-1] == q.shape[-1] == k.shape[-1] and q.dim() == 4 and unsqueeze_dim == 1
    fused = twin("rotate", q, k, cos, sin) if whole else None
    if fused is not None:
        return fused(q, k, cos, sin)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = cos.shape[-1]
    if turned == x.shape[-1]:
        return rotate(x, cos, sin)
    return torch.cat([rotate(x[..., :turned], cos, sin), x[..., turned:]], -1)


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
