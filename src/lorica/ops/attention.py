"""Attention on a CPU where torch's own is slow: for many short texts, and in half precision.

torch's kernel works on one text and head at a time, which costs more than the work itself where a
text has a dozen tokens: 32 texts of 16 tokens and 12 heads take 5.6 ms there, forward and backward,
and 2.2 ms as batched products. Those pay up to some thirty tokens; then there are as many
probabilities to keep as features.

In bfloat16 its backward pass takes up to 6 times as long as in float32 for texts of less than 100
tokens, 1.5 to 2 times at a few hundred, and no less for longer ones (a processor with AVX-512 and
bfloat16 products; see the lab book). So what is narrow is widened for the kernel, and narrow again
where it is kept.

Legend: N texts, L tokens of the longest, H heads, D features of a head, B = N H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

_AMX = torch.cpu._is_amx_tile_supported()

SHORT = 32
"""Tokens up to which batched products are the faster way."""


def is_short(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `short_attention` is the way for these, (N, H, L, D): few tokens, and as many heads
    of keys as of queries, on a CPU.
    """
    return q.device.type == "cpu" and q.shape == k.shape == v.shape and q.shape[2] <= SHORT


def short_attention(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float) -> Tensor:
    """Attention of every token to all tokens of its text.

    Semantics: F.scaled_dot_product_attention(q, k, v, attn_mask=real, scale=scale)

    Args:
        q, k, v: (N, H, L, D).
        real: (N, 1, 1, L) or (N, 1, L, L), bool: which tokens are seen, at least one by each; None:
            all.
    """
    return _ShortAttention.apply(q, k, v, real, scale)


class _ShortAttention(torch.autograd.Function):
    """Saves queries, keys, values and the probabilities, which are float32 or wider."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # which would narrow the scores
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float
    ) -> Tensor:
        shape, length = q.shape, q.shape[2]
        narrow_BLD = [t.reshape(-1, length, shape[3]) for t in (q, k, v)]
        q_BLD, k_BLD, v_BLD = map(_wide, narrow_BLD)
        scores = torch.bmm(q_BLD, k_BLD.transpose(1, 2)).mul_(scale)
        if real is not None:
            scores.view(*shape[:2], length, length).masked_fill_(~real, float("-inf"))
        p_BLL = torch.softmax(scores, -1)
        ctx.save_for_backward(*narrow_BLD, p_BLL)
        ctx.scale, ctx.shape = scale, shape
        return torch.bmm(p_BLL, v_BLD).view(shape).to(q.dtype)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, g: Tensor) -> tuple:
        # with p = softmax(s): ds = p (dp - sum(p dp))
        *narrow_BLD, p_BLL = ctx.saved_tensors
        q_BLD, k_BLD, v_BLD = map(_wide, narrow_BLD)
        g_BLD = _wide(g.reshape(q_BLD.shape))
        dv = torch.bmm(p_BLL.transpose(1, 2), g_BLD)
        ds = torch.bmm(g_BLD, v_BLD.transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(ds, p_BLL, -1, p_BLL.dtype).mul_(ctx.scale)
        dq, dk = torch.bmm(ds, k_BLD), torch.bmm(ds.transpose(1, 2), q_BLD)
        return *(d.view(ctx.shape).to(g.dtype) for d in (dq, dk, dv)), None, None


def is_narrow(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `narrow_attention` is the way for these, (N, H, L, D): half precision on a CPU, in
    shapes that its kernel takes, which it does not check. How it does with AMX was not measured,
    so there it is left as it is.
    """
    if _AMX or q.device.type != "cpu" or q.element_size() != 2 or q.dim() != 4 or k.dim() != 4:
        return False
    given = q, k, v
    if any(not t.numel() or t.stride(-1) != 1 for t in given):
        return False
    alike = k.shape == v.shape and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    return alike and q.shape[1] % k.shape[1] == 0


def narrow_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, *, causal: bool
) -> Tensor:
    """torch's attention in float32, of tensors that are kept in half precision.

    Semantics: F.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal, scale=scale,
        enable_gqa=True).to(q.dtype)

    Args:
        q: (N, H, L, D). k, v: (N, heads of keys, keys, D).
        mask: what a query sees, bool, broadcast against (N, H, L, keys); None with `causal`.
    """
    if mask is not None:
        mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    return _NarrowAttention.apply(q, k, v, mask, scale, causal)


class _NarrowAttention(torch.autograd.Function):
    """Saves queries, keys, values and the output in half precision, the mask as it is, and a number
    per query.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        causal: bool,
    ) -> Tensor:
        wide, logsumexp = _forward(
            q.float(), k.float(), v.float(), 0.0, causal, attn_mask=_added(mask), scale=scale
        )
        out = wide.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, logsumexp, mask)
        ctx.how = scale, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        q, k, v, out, logsumexp, mask = ctx.saved_tensors
        scale, causal = ctx.how
        wide = (t.float() for t in (g, q, k, v, out))
        made = _backward(*wide, logsumexp, 0.0, causal, attn_mask=_added(mask), scale=scale)
        return *(d.to(g.dtype) for d in made), None, None, None


def _added(mask: Tensor | None) -> Tensor | None:
    """A mask as the kernel wants it: what is added to scores."""
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, float("-inf"))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.element_size() < 4 else x
