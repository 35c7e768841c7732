"""Rotary positions on CUDA: queries and keys turned in one kernel; nothing is kept but the angles.

Su et al. 2021, "RoFormer" (arXiv 2104.09864), with the pairs (d, d + D/2) of the Llama family. The
backward pass is the same turn by the opposite angle. Plain autograd makes eight passes over queries
and keys for what is two here.

Legend: N batch, H heads, T positions, D width of a head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorica.ops.triton.launch import block, launch


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by the angles of their positions.

    Semantics: x * cos[:, None] + cat(-x[..., D // 2 :], x[..., : D // 2], -1) * sin[:, None]
        for x in (q, k)

    Args:
        q: (N, H, T, D). k: (N, K, T, D); it may have fewer heads. D is even.
        cos, sin: (N, T, D) or (1, T, D), without gradients.

    Returns:
        two tensors of the shapes, dtypes and memory layouts of q and k.
    """
    assert q.shape[-1] % 2 == 0 and cos.shape == sin.shape
    return _Rotation.apply(q, k, cos, sin)  # pyright: ignore[reportReturnType]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turn_both(q, k, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple:
        return *_turn_both(dq, dk, *ctx.saved_tensors, back=True), None, None


def _turn_both(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool
) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin))
    turned = torch.empty_like(q), torch.empty_like(k)  # which keep the order of the strides
    batch, _, positions, width = q.shape
    angles = [(t.stride(0) if t.shape[0] > 1 else 0, t.stride(1)) for t in (cos, sin)]
    strides = [s for t in (q, k, *turned) for s in t.stride()[:3]]
    launch(
        _turn,
        (batch * positions,),
        q, k, *turned, cos, sin,
        *strides, *angles[0], *angles[1],
        q.shape[1], k.shape[1], positions, width // 2,
        HEADS=block(q.shape[1], 16, 1), HALF=block(width // 2, 4096), BACK=back,
    )  # fmt: skip
    return turned


@triton.jit
def _turn(
    q, k, q_out, k_out, cos, sin,
    q_n, q_h, q_t, k_n, k_h, k_t, qo_n, qo_h, qo_t, ko_n, ko_h, ko_t,
    cos_n, cos_t, sin_n, sin_t,
    q_heads, k_heads, positions, half,
    HEADS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """One program per token; the angles are loaded once for all its heads."""
    n = tl.program_id(0).to(tl.int64) // positions
    t = tl.program_id(0).to(tl.int64) % positions
    d = tl.arange(0, HALF)
    inside = d < half
    at = cos + n * cos_n + t * cos_t + d
    cos_1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    at = sin + n * sin_n + t * sin_t + d
    sin_1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    if BACK:  # the transpose: where both halves have the same angles, the turn by minus the angle
        sin_1, sin_2 = -sin_2, -sin_1
    q += n * q_n + t * q_t
    q_out += n * qo_n + t * qo_t
    _turn_heads(q, q_out, q_h, qo_h, q_heads, half, cos_1, cos_2, sin_1, sin_2, HEADS, HALF)
    k += n * k_n + t * k_t
    k_out += n * ko_n + t * ko_t
    _turn_heads(k, k_out, k_h, ko_h, k_heads, half, cos_1, cos_2, sin_1, sin_2, HEADS, HALF)


@triton.jit
def _turn_heads(
    x, out, x_h, out_h, heads, half, cos_1, cos_2, sin_1, sin_2,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, HALF)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & (d < half)[None, :]
        head = head.to(tl.int64)
        at = x + head[:, None] * x_h + d[None, :]
        x_1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        x_2 = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
        y_1 = x_1 * cos_1[None, :] - x_2 * sin_1[None, :]
        y_2 = x_2 * cos_2[None, :] + x_1 * sin_2[None, :]
        to = out + head[:, None] * out_h + d[None, :]
        tl.store(to, y_1.to(out.dtype.element_ty), mask=inside)
        tl.store(to + half, y_2.to(out.dtype.element_ty), mask=inside)
