"""RMSNorm on CUDA, with a frozen weight: one pass each way, and nothing wide is kept but the input.

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv 1910.07467). Kept for the
backward pass are the input, by reference, and one float per row; plain autograd keeps two float32
copies of the input.

Legend: T rows, D width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorica.ops.triton.launch import block, launch, pieces, rows_of

TILE = 4096
"""Numbers that a program holds at once: several rows where they are short."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Divide every row by its root mean square.

    Semantics: x * rsqrt(mean(x ** 2, -1) + eps) * (offset + weight)

    Args:
        x: (..., D). It is normalised in float32, and rounded before the product with the weight;
            with an offset after it.
        weight: (D,), frozen: it gets no gradient.
        eps: added to the mean square.
        offset: is added to the weight: some models keep theirs around zero.

    Returns:
        (..., D), in the dtype that x and weight promote to.
    """
    trains = torch.is_grad_enabled() and weight.requires_grad
    assert not trains, "the weight of the norm is not frozen"
    return _RMSNorm.apply(x, weight, eps, offset)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        x_TD, weight = rows_of(x), weight.contiguous()
        rows, width = x_TD.shape
        dtype = torch.promote_types(x.dtype, weight.dtype)
        out_TD = torch.empty(rows, width, dtype=dtype, device=x.device)
        rstd_T = torch.empty(rows, dtype=torch.float32, device=x.device)
        grid, sizes = _tiles(rows, width)
        shape = (rows, width, x_TD.stride(0))
        launch(
            _forward,
            grid,
            x_TD,
            weight,
            out_TD,
            rstd_T,
            *shape,
            eps,
            offset,
            ROUND=offset == 0,
            **sizes,
        )
        ctx.save_for_backward(x, weight, rstd_T)
        ctx.offset = offset
        return out_TD.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, weight, rstd_T = ctx.saved_tensors
        x_TD, g_TD = rows_of(x), rows_of(g)
        rows, width = x_TD.shape
        dx_TD = torch.empty(rows, width, dtype=x.dtype, device=x.device)
        grid, sizes = _tiles(rows, width)
        shape = (rows, width, x_TD.stride(0), g_TD.stride(0))
        launch(_backward, grid, x_TD, weight, g_TD, rstd_T, dx_TD, *shape, ctx.offset, **sizes)
        return dx_TD.view(x.shape), None, None, None


def _tiles(rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the rows and columns of a tile."""
    columns = block(width, TILE)
    height = TILE // columns
    return (pieces(rows, height),), {"ROWS": height, "BLOCK": columns}


@triton.jit
def _forward(
    x, weight, out, rstd, num_rows, width, x_row, eps, offset,
    ROUND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (column < width)[None, :]
        at = row[:, None] * x_row + column[None, :]
        h = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        squares += tl.sum(h * h, axis=1)
    scale = tl.rsqrt(squares / width + eps)
    tl.store(rstd + row, scale, mask=there)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (column < width)[None, :]
        at = row[:, None] * x_row + column[None, :]
        h = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
        h *= scale[:, None]
        if ROUND:  # where torch rounds
            h = h.to(x.dtype.element_ty).to(tl.float32)
        to = row[:, None] * width + column[None, :]
        tl.store(out + to, (h * w[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, weight, g, rstd, dx, num_rows, width, x_row, g_row, offset,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = rstd (w g - x^ mean(w g x^)), with x^ = x rstd and the offset in w."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    scale = tl.load(rstd + row, mask=there, other=0.0)
    along = tl.zeros((ROWS,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (column < width)[None, :]
        h = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0)
        d = tl.load(g + row[:, None] * g_row + column[None, :], mask=inside, other=0.0)
        w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
        d = d.to(tl.float32) * w[None, :]
        along += tl.sum(d * (h.to(tl.float32) * scale[:, None]), axis=1)
    along = along / width
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = there[:, None] & (column < width)[None, :]
        h = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0)
        d = tl.load(g + row[:, None] * g_row + column[None, :], mask=inside, other=0.0)
        w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32) + offset
        h = h.to(tl.float32) * scale[:, None]
        d = (d.to(tl.float32) * w[None, :] - h * along[:, None]) * scale[:, None]
        to = row[:, None] * width + column[None, :]
        tl.store(dx + to, d.to(dx.dtype.element_ty), mask=inside)
