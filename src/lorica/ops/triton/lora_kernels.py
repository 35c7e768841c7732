"""Kernels of the LoRA products on CUDA, for many segments of rows in one launch.

Rows of a segment are cut into tiles that begin where the segment begins, and sums over rows are
taken tile by tile in a fixed order, with a second kernel that adds the tiles up. So no sum depends
on how threads are scheduled, nor on what other segments hold: what an adapter computes beside
others is what it computes alone.

Legend: T rows (tokens), D features (in or out), R columns for ranks: the largest rank of all
segments, filled up to a power of two. `factors` is (sum of ranks, D), all adapters' rows one below
the other; strides make it A, or B transposed.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorica.ops.triton.launch import block, launch, pieces

LOW = 64
"""Rows of a tile where all that is written has as many rows."""
HIGH = 256
"""Rows of a tile where a sum along the rows is written for each: the fewer, the less to write."""
FUSED_RANK = 32
"""The largest R for which `shrink` writes and reads less for the sum along the rows (8 R / HIGH
bytes for every number) than it saves by not reading x again (2 bytes in half precision)."""
TALL = 1024
"""Rows of a tile where nothing but a sum along the rows is written."""
COLUMNS = 64
"""Columns that a program takes at a time, where it goes along them."""
SPLIT = 1024
"""Columns of one part of a sum along the columns: the parts give a GPU enough programs."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """Where the tiles of all segments lie.

    Attributes:
        table: (tiles, 5), int64: first row, row after the last, first rank, number of ranks, and
            segment.
        bounds: (segments + 1,), int64: the tiles of segment i are bounds[i] to bounds[i + 1].
        widest: R.
        height: the most rows of a tile.
    """

    table: Tensor
    bounds: Tensor
    widest: int
    height: int


@lru_cache(maxsize=64)  # all layers of a step ask for the same few
def cut(
    rows: tuple[tuple[int, int], ...], ranks: tuple[int, ...], height: int, device: torch.device
) -> Tiles:
    """Cut segments (first row, row after the last) of these ranks into tiles."""
    table: list[tuple[int, int, int, int, int]] = []
    bounds, offset = [0], 0
    for segment, ((start, end), rank) in enumerate(zip(rows, ranks, strict=True)):
        for first in range(start, end, height):
            table.append((first, min(first + height, end), offset, rank, segment))
        bounds.append(len(table))
        offset += rank
    return Tiles(
        torch.tensor(table, dtype=torch.int64).reshape(-1, 5).to(device),
        torch.tensor(bounds, dtype=torch.int64).to(device),
        block(max(ranks), 2**16),
        height,
    )


@lru_cache(maxsize=64)
def per_segment(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One number for each segment, float32."""
    return torch.tensor(values, dtype=torch.float32).to(device)


# --- down to the ranks ----------------------------------------------------------------------------


def shrink(
    x_TD: Tensor,
    factors: Tensor,
    tiles: Tiles,
    scales: Tensor,
    *,
    S_TR: Tensor | None = None,
    outer_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The thin product, and on wish the product along the rows out of the same reading of x.

    Semantics: for s in segments:
        down[rows(s)] = scale(s) * x[rows(s)] @ factors[ranks(s)].T
        outer[s] = outer_scale(s) * S[rows(s)].T @ x[rows(s)]

    Args:
        x_TD: (T, D), columns neighbouring. factors: (sum of ranks, D), any strides, dtype of x.
        scales: (segments,), float32.
        S_TR: (T, R), dtype of x: asks for `outer`, with `outer_scales`. It is what B's gradient
            needs: x is then the gradient of the output, factors is B transposed.

    Returns:
        down (T, R) in the dtype of x, in rows of no segment undefined, in columns beyond a
        segment's ranks zero; outer (segments, R, D) in float32.
    """
    rows, width = x_TD.shape
    num_tiles, splits = len(tiles.table), pieces(width, SPLIT)
    R, device = tiles.widest, x_TD.device
    parts = torch.empty(splits, rows, R, dtype=torch.float32, device=device)
    summed = num_tiles if S_TR is not None else 0
    outer_parts = torch.empty(summed, R, width, dtype=torch.float32, device=device)
    launch(
        _shrink,
        (num_tiles, splits),
        x_TD, factors, parts, x_TD if S_TR is None else S_TR, outer_parts, tiles.table,
        rows, width, x_TD.stride(0), *factors.stride(), 0 if S_TR is None else S_TR.stride(0),
        RANKS=R, HEIGHT=tiles.height, COLUMNS=COLUMNS, SPLIT=SPLIT, OUTER=S_TR is not None,
        num_warps=4 if S_TR is None else 8, num_stages=3 if S_TR is None else 2,
    )  # fmt: skip
    down = torch.empty(rows, R, dtype=x_TD.dtype, device=device)
    launch(
        _add_splits, (num_tiles,), parts, down, tiles.table, scales, splits, rows * R,
        RANKS=R, HEIGHT=tiles.height,
    )  # fmt: skip
    if outer_scales is None:
        return down, None
    return down, _add_tiles(outer_parts, tiles, outer_scales)


@triton.jit
def _shrink(
    x, factors, parts, S, outer, table, rows, width, x_row, f_rank, f_column, s_row,
    RANKS: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
    OUTER: tl.constexpr,
):  # fmt: skip
    """One tile of rows and SPLIT columns."""
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    row = tl.load(table + tile * 5) + tl.arange(0, HEIGHT)
    in_rows = row < tl.load(table + tile * 5 + 1)
    first_rank = tl.load(table + tile * 5 + 2)
    rank = tl.arange(0, RANKS)
    in_ranks = rank < tl.load(table + tile * 5 + 3)
    total = tl.zeros((HEIGHT, RANKS), tl.float32)
    if OUTER:
        of_s = S + row[:, None] * s_row + rank[None, :]
        s = tl.load(of_s, mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
    for start in range(0, SPLIT, COLUMNS):
        column = split * SPLIT + start + tl.arange(0, COLUMNS)
        inside = column < width
        of_x = x + row[:, None] * x_row + column[None, :]
        tile_x = tl.load(of_x, mask=in_rows[:, None] & inside[None, :], other=0.0)
        of_f = factors + (first_rank + rank)[None, :] * f_rank + column[:, None] * f_column
        f = tl.load(of_f, mask=inside[:, None] & in_ranks[None, :], other=0.0)
        total = tl.dot(tile_x, f, total, input_precision="ieee")
        if OUTER:
            product = tl.dot(tl.trans(s), tile_x, input_precision="ieee")
            to = outer + (tile * RANKS + rank)[:, None] * width + column[None, :]
            tl.store(to, product, mask=inside[None, :])
    to = parts + (split * rows + row)[:, None] * RANKS + rank[None, :]
    tl.store(to, total, mask=in_rows[:, None])


@triton.jit
def _add_splits(parts, out, table, scales, splits, size, RANKS: tl.constexpr, HEIGHT: tl.constexpr):
    """Add the splits of one tile in their order, and scale."""
    tile = tl.program_id(0).to(tl.int64)
    row = tl.load(table + tile * 5) + tl.arange(0, HEIGHT)
    inside = (row < tl.load(table + tile * 5 + 1))[:, None]
    at = row[:, None] * RANKS + tl.arange(0, RANKS)[None, :]
    total = tl.zeros((HEIGHT, RANKS), tl.float32)
    for _ in range(0, splits):
        total += tl.load(parts + at, mask=inside, other=0.0)
        parts += size
    total *= tl.load(scales + tl.load(table + tile * 5 + 4))
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


# --- up from the ranks ----------------------------------------------------------------------------


def expand(
    S_TR: Tensor, factors: Tensor, y_TD: Tensor, tiles: Tiles, scales: Tensor, *, add: bool
) -> None:
    """The wide product, into `y` or added to it.

    Semantics: for s in segments: y[rows(s)] (+)= scale(s) * S[rows(s)] @ factors[ranks(s)]

    Args:
        S_TR: (T, R), as `shrink` makes it. factors: (sum of ranks, D), any strides, dtype of S.
        y_TD: (T, D), columns neighbouring; rows of no segment are left alone.
    """
    width = y_TD.shape[1]
    columns = block(width, 2 * COLUMNS)
    launch(
        _expand,
        (len(tiles.table), pieces(width, columns)),
        S_TR, factors, y_TD, tiles.table, scales,
        width, S_TR.stride(0), *factors.stride(), y_TD.stride(0),
        RANKS=tiles.widest, HEIGHT=tiles.height, COLUMNS=columns, ADD=add,
    )  # fmt: skip


@triton.jit
def _expand(
    S, factors, y, table, scales, width, s_row, f_rank, f_column, y_row,
    RANKS: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    row = tl.load(table + tile * 5) + tl.arange(0, HEIGHT)
    in_rows = row < tl.load(table + tile * 5 + 1)
    first_rank = tl.load(table + tile * 5 + 2)
    rank = tl.arange(0, RANKS)
    in_ranks = rank < tl.load(table + tile * 5 + 3)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    of_s = S + row[:, None] * s_row + rank[None, :]
    s = tl.load(of_s, mask=in_rows[:, None] & in_ranks[None, :], other=0.0)
    of_f = factors + (first_rank + rank)[:, None] * f_rank + column[None, :] * f_column
    f = tl.load(of_f, mask=in_ranks[:, None] & inside[None, :], other=0.0)
    product = tl.dot(s, f, input_precision="ieee")
    product *= tl.load(scales + tl.load(table + tile * 5 + 4))
    at = y + row[:, None] * y_row + column[None, :]
    mask = in_rows[:, None] & inside[None, :]
    if ADD:
        product += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, product.to(y.dtype.element_ty), mask=mask)


# --- along the rows -------------------------------------------------------------------------------


def outer(S_TR: Tensor, x_TD: Tensor, tiles: Tiles, scales: Tensor) -> Tensor:
    """The product along the rows.

    Semantics: for s in segments: outer[s] = scale(s) * S[rows(s)].T @ x[rows(s)]

    Args:
        S_TR: (T, R), as `shrink` makes it. x_TD: (T, D), columns neighbouring, dtype of S.
        tiles: as high as TALL, say.

    Returns:
        (segments, R, D), float32.
    """
    width = x_TD.shape[1]
    parts = torch.empty(
        len(tiles.table), tiles.widest, width, dtype=torch.float32, device=x_TD.device
    )
    columns = block(width, 2 * COLUMNS)
    launch(
        _outer,
        (len(tiles.table), pieces(width, columns)),
        S_TR, x_TD, parts, tiles.table, width, S_TR.stride(0), x_TD.stride(0),
        RANKS=tiles.widest, HEIGHT=LOW, COLUMNS=columns,
    )  # fmt: skip
    return _add_tiles(parts, tiles, scales)


@triton.jit
def _outer(
    S, x, parts, table, width, s_row, x_row,
    RANKS: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    first = tl.load(table + tile * 5)
    end = tl.load(table + tile * 5 + 1)
    rank = tl.arange(0, RANKS)
    in_ranks = rank < tl.load(table + tile * 5 + 3)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros((RANKS, COLUMNS), tl.float32)
    for start in range(first, end, HEIGHT):
        row = start + tl.arange(0, HEIGHT)
        of_s = S + row[None, :] * s_row + rank[:, None]
        s = tl.load(of_s, mask=in_ranks[:, None] & (row < end)[None, :], other=0.0)
        of_x = x + row[:, None] * x_row + column[None, :]
        tile_x = tl.load(of_x, mask=(row < end)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(s, tile_x, total, input_precision="ieee")
    to = parts + (tile * RANKS + rank)[:, None] * width + column[None, :]
    tl.store(to, total, mask=inside[None, :])


def _add_tiles(parts: Tensor, tiles: Tiles, scales: Tensor) -> Tensor:
    """(tiles, R, D) -> (segments, R, D): the second pass of sums along the rows."""
    size = parts.shape[1] * parts.shape[2]
    out = torch.empty(len(scales), *parts.shape[1:], dtype=torch.float32, device=parts.device)
    grid = (len(scales), pieces(size, 1024))
    launch(_add_parts, grid, parts, out, tiles.bounds, scales, size, BLOCK=1024)
    return out


@triton.jit
def _add_parts(parts, out, bounds, scales, size, BLOCK: tl.constexpr):
    """Add the tiles of one segment in their order, and scale; a segment without rows gives zero."""
    segment = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.load(bounds + segment)
    parts += first * size
    for _ in range(first, tl.load(bounds + segment + 1)):
        total += tl.load(parts + at, mask=at < size, other=0.0)
        parts += size
    total *= tl.load(scales + segment)
    tl.store(out + segment * size + at, total, mask=at < size)
