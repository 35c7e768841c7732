"""Attention for many short texts on a CPU, as batched products.

torch's own kernel works on one text and head at a time, which costs more than the work itself where
a text has a dozen tokens: 32 texts of 16 tokens and 12 heads take 5.6 ms there, forward and
backward, and 2.2 ms here. It pays up to some thirty tokens; then there are as many probabilities to
keep as features.

Legend: N texts, L tokens of the longest, H heads, D features of a head, B = N H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT = 32
"""Tokens up to which it is the faster way."""


def is_short(q: Tensor, k: Tensor) -> bool:
    """Whether `short_attention` is the way for these, (N, H, L, D): few tokens, as many heads of
    keys as of queries, and full precision on a CPU.
    """
    full = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)
    return full and q.shape == k.shape and q.shape[2] <= SHORT


def short_attention(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float) -> Tensor:
    """Attention of every token to all tokens of its text.

    Semantics: F.scaled_dot_product_attention(q, k, v, attn_mask=real, scale=scale)

    Args:
        q, k, v: (N, H, L, D).
        real: (N, 1, 1, L) or (N, 1, L, L), bool: which tokens are seen; None: all.
    """
    return _ShortAttention.apply(q, k, v, real, scale)


class _ShortAttention(torch.autograd.Function):
    """Saves queries, keys, values and the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float
    ) -> Tensor:
        shape, length = q.shape, q.shape[2]
        q_BLD, k_BLD, v_BLD = (t.reshape(-1, length, shape[3]) for t in (q, k, v))
        scores = torch.bmm(q_BLD, k_BLD.transpose(1, 2)).mul_(scale)
        if real is not None:
            scores.view(*shape[:2], length, length).masked_fill_(~real, float("-inf"))
        p_BLL = torch.softmax(scores, -1)
        ctx.save_for_backward(q_BLD, k_BLD, v_BLD, p_BLL)
        ctx.scale, ctx.shape = scale, shape
        return torch.bmm(p_BLL, v_BLD).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        # with p = softmax(s): ds = p (dp - sum(p dp))
        q_BLD, k_BLD, v_BLD, p_BLL = ctx.saved_tensors
        g_BLD = g.reshape(q_BLD.shape)
        dv = torch.bmm(p_BLL.transpose(1, 2), g_BLD)
        ds = torch.bmm(g_BLD, v_BLD.transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(ds, p_BLL, -1, p_BLL.dtype).mul_(ctx.scale)
        dq, dk = torch.bmm(ds, k_BLD), torch.bmm(ds.transpose(1, 2), q_BLD)
        return dq.view(ctx.shape), dk.view(ctx.shape), dv.view(ctx.shape), None, None
