"""SwiGLU on CUDA: silu(gate) * up in one pass, its gradients in another.

Plain autograd keeps four tensors as wide as the hidden layer of the block (gate, silu(gate), up and
the product) and makes five passes; here two are kept, and the backward pass may write the gradients
into their memory.

Legend: T rows, F width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from lorica.ops.triton.launch import block, launch, pieces, rows_of


def swiglu(gate: Tensor, up: Tensor, *, overwrite: bool = False) -> Tensor:
    """The gated activation of Llama-like blocks (Shazeer 2020, arXiv 2002.05202).

    Semantics: F.silu(gate) * up

    Args:
        gate, up: (..., F), of one shape and dtype.
        overwrite: write the gradients over `gate` and `up`. For a caller that made both and lets
            nobody else read them; autograd refuses a second backward pass.

    Returns:
        (..., F), in the dtype of `gate`.
    """
    return _SwiGLU.apply(gate, up, overwrite)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, overwrite: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.overwrite = overwrite
        gate_TF, up_TF = rows_of(gate), rows_of(up)
        out_TF = torch.empty(gate_TF.shape, dtype=gate.dtype, device=gate.device)
        rows, width = gate_TF.shape
        size = block(width, 1024)
        strides = gate_TF.stride(0), up_TF.stride(0)
        grid = (rows, pieces(width, size))
        launch(_forward, grid, gate_TF, up_TF, out_TF, *strides, width, BLOCK=size)
        return out_TF.view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        gate, up = ctx.saved_tensors
        gate_TF, up_TF, g_TF = rows_of(gate), rows_of(up), rows_of(g)
        if ctx.overwrite:
            dgate_TF, dup_TF = gate_TF, up_TF
            increment_version([gate, up])
        else:
            dgate_TF, dup_TF = (
                torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate_TF, up_TF)
            )
        rows, width = gate_TF.shape
        size = block(width, 1024)
        tensors = (gate_TF, up_TF, g_TF, dgate_TF, dup_TF)
        strides = [t.stride(0) for t in tensors]
        launch(_backward, (rows, pieces(width, size)), *tensors, *strides, width, BLOCK=size)
        return dgate_TF.view(gate.shape), dup_TF.view(up.shape), None


@triton.jit
def _forward(gate, up, out, gate_row, up_row, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    e = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    silu = (e * tl.sigmoid(e)).to(out.dtype.element_ty).to(tl.float32)  # rounded where torch rounds
    tl.store(out + row * width + column, (silu * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    gate, up, g, dgate, dup,
    gate_row, up_row, g_row, dgate_row, dup_row, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate and dup may be gate and up: every element is read and written by one program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    e = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(g + row * g_row + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(e)
    silu = (e * sigmoid).to(gate.dtype.element_ty).to(tl.float32)
    de = d * u * sigmoid * (1.0 + e * (1.0 - sigmoid))
    tl.store(dgate + row * dgate_row + column, de.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * dup_row + column, (d * silu).to(dup.dtype.element_ty), mask=inside)
