"""Products with a weight in four bits on CUDA, which is unpacked inside the kernel.

Unpacking first writes the weight and reads it again, 4 bytes a number where 0.52 are stored. That
is nothing beside the product of a long batch, and nearly all there is to do for a few rows, such as
those of a generated token. The kernel here unpacks a tile where it multiplies it: no number of the
weight is ever written. But every tile of rows unpacks the weight anew, and its product cannot be as
good as cuBLAS's. `costs` weighs the two; above some hundreds of rows the weight is unpacked once.

A number is rounded to the dtype of the product before it is multiplied, as it is where the weight
is unpacked first, so that both ways differ in the order of their sums alone.

Legend: T rows (tokens), I in features, O out features; D is I or O, whichever the product has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorica.ops.four_bit import NEST, book_values, nested_map
from lorica.ops.packed import Packed
from lorica.ops.triton.launch import block, launch, pieces, rows_of

TALLEST = 128
"""The most rows of a tile."""
SIDE = 64
"""Rows and columns of a tile of the weight."""

_STORED = 0.52
"""Bytes of a number as it lies, in blocks of 64 with scales in 8 bits."""
_PASSING = 4.0
"""Bytes of a number in half precision, written once and read once."""
_BALANCE = 180
"""Floating-point operations that a GPU does while it moves a byte: 160 (L4) to 195 (A100), an H200
184."""
_SLOWER = 2.0
"""Time of a product in this kernel over that of cuBLAS. Assumed, not measured."""


def costs(rows: int) -> tuple[float, float]:
    """Time of a product, as the bytes that could be moved meanwhile, for each number of the weight:
    unpacked inside the kernel, and unpacked before.

    Semantics: with p = 2 * rows / 180, and tiles = ceil(rows / 128):
        0.52 * tiles + 2 * p, and 0.52 + 4 + p
    """
    product = 2 * rows / _BALANCE
    tiles = pieces(rows, TALLEST)
    return _STORED * tiles + _SLOWER * product, _STORED + _PASSING + product


def packed_product(
    x: Tensor, weight: Packed, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor | None:
    """A product with a packed weight, see `ops.packed.dense` and `ops.packed.input_gradient`.

    Semantics: F.linear(x, numbers of weight, bias); x @ numbers of weight where `transposed`

    Args:
        x: (..., I), or (..., O) where `transposed`; in half precision.
        weight: of shape (O, I). bias: (O,).

    Returns:
        (..., O) or (..., I) in the dtype of x; None where the weight is not in four bits, its rows
        have an odd number of places, or unpacking it first costs less.
    """
    inside, before = costs(x.shape[:-1].numel())
    if weight.form is None or weight.shape[1] % 2 or inside >= before:
        return None
    return multiplied(x, weight, bias, transposed=transposed)


def multiplied(
    x: Tensor, weight: Packed, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """`packed_product`, whatever it costs."""
    form, (num_out, num_in) = weight.form, weight.shape
    assert form is not None
    rows, made = rows_of(x), num_in if transposed else num_out
    out = torch.empty(len(rows), made, dtype=x.dtype, device=x.device)
    absmax = weight.tensors["absmax"]
    nested = weight.tensors.get("nested_absmax", absmax)
    height = block(len(rows), TALLEST)
    launch(
        _product,
        (pieces(len(rows), height), pieces(made, SIDE)),
        rows, weight.tensors["weight"].view(torch.uint8), absmax, nested,
        weight.tensors.get("nested_offset", absmax), book_values(form.book, x.device),
        nested_map(x.device), x if bias is None else bias, out,
        len(rows), num_out, num_in, rows.stride(0), out.stride(0),
        HEIGHT=height, SIDE=SIDE, BLOCK=form.block, NESTED="nested_absmax" in weight.tensors,
        NEST=NEST, EVEN=num_in % form.block == 0 and form.block % SIDE == 0, TRANSPOSED=transposed,
        BIASED=bias is not None, num_warps=8 if height > SIDE else 4,
    )  # fmt: skip
    return out.view(*x.shape[:-1], made)


@triton.jit
def _numbers(
    packed, absmax, nested, offset, book, code, row, column, num_out, num_in,
    SIDE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, NEST: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The numbers of the weight from (row, column) on, (SIDE, SIDE), float32; beyond its edges they
    are finite. Where the blocks are EVEN, a row of the tile lies in one block.
    """
    o = row + tl.arange(0, SIDE).to(tl.int64)
    half = tl.arange(0, SIDE // 2)
    at = o[:, None] * num_in + column
    in_rows = (o < num_out)[:, None]
    inside = in_rows & (column + 2 * half < num_in)[None, :]
    both = tl.load(packed + at // 2 + half[None, :], mask=inside, other=0).to(tl.int32)
    values = tl.interleave(tl.load(book + (both >> 4)), tl.load(book + (both & 15)))
    if EVEN:
        of_block = at // BLOCK
        known = in_rows & (column < num_in)
    else:
        of_block = (at + 2 * half[None, :]) // BLOCK  # both places of a byte lie in one block
        known = inside
    scale = tl.load(absmax + of_block, mask=known, other=0)
    if NESTED:
        scale = tl.load(code + scale.to(tl.int32))
        scale = scale * tl.load(nested + of_block // NEST, mask=known, other=0.0)
        scale = scale + tl.load(offset)
    if not EVEN:
        scale = tl.interleave(scale, scale)
    return values * scale


@triton.jit
def _product(
    x, packed, absmax, nested, offset, book, code, bias, out,
    T, num_out, num_in, x_row, out_row,
    HEIGHT: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
    NEST: tl.constexpr, EVEN: tl.constexpr, TRANSPOSED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """One tile of the product: HEIGHT rows, SIDE columns, the whole sum."""
    t = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    first = tl.program_id(1).to(tl.int64) * SIDE
    made = first + tl.arange(0, SIDE)
    summed = num_out if TRANSPOSED else num_in
    width = num_in if TRANSPOSED else num_out
    total = tl.zeros((HEIGHT, SIDE), tl.float32)
    for start in range(0, summed, SIDE):
        d = start + tl.arange(0, SIDE)
        of_x = x + t[:, None] * x_row + d[None, :]
        given = tl.load(of_x, mask=(t < T)[:, None] & (d < summed)[None, :], other=0.0)
        row = start if TRANSPOSED else first
        column = first if TRANSPOSED else start
        w = _numbers(
            packed, absmax, nested, offset, book, code, row, column, num_out, num_in,
            SIDE, BLOCK, NESTED, NEST, EVEN,
        ).to(x.dtype.element_ty)  # fmt: skip
        total = tl.dot(given, w if TRANSPOSED else tl.trans(w), total)
    if BIASED:
        total += tl.load(bias + made, mask=made < width, other=0.0).to(tl.float32)[None, :]
    mask = (t < T)[:, None] & (made < width)[None, :]
    to = out + t[:, None] * out_row + made[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=mask)
