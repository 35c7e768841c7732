"""RMSNorm with a frozen weight: keeps its input and one number per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorica.ops.triton.choose import twin


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Root mean square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467) of each row.

    Semantics: x * rsqrt(mean(x ** 2, -1) + eps) * (offset + weight)

    Args:
        x: (..., D). Half precision is normalised in float32, and rounded before the product with
            the weight; with an offset after it.
        weight: (D,), in the dtype of `x`. It is taken for frozen and gets no gradient.
        offset: is added to the weight: some models keep theirs around zero.
    """
    if (fused := twin("rms_norm", x, weight)) is not None:
        return fused(x, weight, eps, offset)
    return _RMSNorm.apply(x, weight, eps, offset)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        wide = _wide(x)
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        rstd = rstd.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        normed = wide * rstd
        if offset:
            return normed.mul_(weight.to(wide.dtype) + offset).to(x.dtype)
        return normed.to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        # with n = x rstd, h = g weight: dx = rstd (h - n mean(h n))
        x, weight, rstd = ctx.saved_tensors
        wide = _wide(x)
        h = _wide(g) * (weight.to(wide.dtype) + ctx.offset)
        along = torch.linalg.vecdot(h, wide, dim=-1).unsqueeze(-1)
        along = along.mul_(rstd.pow(3)).div_(-x.shape[-1])
        dx = h.mul_(rstd).addcmul_(wide, along)
        return dx.to(x.dtype), None, None, None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
