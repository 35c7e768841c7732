"""The layout of documents in one flat row, and of the rectangles in which they are attended.

A batch is laid out as one row of tokens, without padding between documents. For attention documents
of similar length lie in rectangles, padded on the right to the longest of each. A rectangle holds
documents of one adapter only, because the blocking of the kernels depends on its shape: that is
what keeps training beside others bitwise equal to training alone.

A document may go on behind another one, which several may have in common: the prompt that records
begin with lies in the row once (see `beginnings`).

Legend: T tokens of the row, H heads, D head width, N documents of a rectangle, L its longest
document, P places of all rectangles of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

ROW_MULTIPLE = 32
"""Every adapter's rows are filled up to a multiple of this: matrix kernels treat the last rows of
an odd number differently, and vector loops have a tail."""

WORTH_A_RECTANGLE = {False: 64 * 64, True: 32 * 32}
"""Padding, in pairs of positions, that costs about as much as the calls of one more rectangle;
less where tokens see both ways and a mask has to hide the padding."""


@dataclass(frozen=True, eq=False)
class Block:
    """The documents of one adapter: rows of the flat batch, and rectangles of documents.

    Attributes:
        shapes: (N, L) of every rectangle; they lie one after the other in P places.
        gather: for every place its row, counted from the block's first; padding points at the first
            filling row, which is there wherever there is padding. (P,)
        scatter: for each row of the block its place; filling rows point at place 0.
        used: rows that belong to documents; the others, if there are any, fill the block up.
        lengths: of its documents, in the order of its rows.
        real: for each rectangle the places that are no padding (N, 1, 1, L), where attention needs
            to be told; None where there is no padding, or where tokens see only what is before
            them.
        fronts: for each rectangle the rows (start, end) of the document that all of its documents
            go on behind; None where they begin by themselves.
    """

    shapes: tuple[tuple[int, int], ...]
    gather: Tensor
    scatter: Tensor
    used: int
    lengths: tuple[int, ...]
    real: tuple[Tensor | None, ...]
    fronts: tuple[tuple[int, int] | None, ...]

    @property
    def size(self) -> int:
        """Rows of the block."""
        return self.scatter.numel()

    def to(self, device: torch.device) -> Block:
        real = tuple(None if mask is None else mask.to(device) for mask in self.real)
        return replace(
            self, gather=self.gather.to(device), scatter=self.scatter.to(device), real=real
        )


@dataclass(frozen=True, eq=False)
class Documents:
    """The layout of a flat row: its blocks, in order, without gaps.

    Attributes:
        both: whether tokens see what comes after them too.
        seen: where a list, every layer adds itself and what its attention gave.
    """

    blocks: tuple[Block, ...]
    both: bool = False
    seen: list[tuple[nn.Module, Tensor]] | None = field(default=None, repr=False)

    def to(self, device: torch.device) -> Documents:
        return replace(self, blocks=tuple(block.to(device) for block in self.blocks))

    def lengthened(self, count: int) -> Lengthened:
        """The layout with `count` more rows in front of every document, each of which begins by
        itself.
        """
        assert not any(front for block in self.blocks for front in block.fronts)
        lengths = [[length + count for length in block.lengths] for block in self.blocks]
        documents, rows, positions = lay_out(lengths, both=self.both)
        total = sum(block.size for block in self.blocks)
        source, kept = torch.zeros(len(positions), dtype=torch.long), []
        before = 0
        for block, (start, end) in zip(self.blocks, rows, strict=True):
            place, row = start, before
            for length in block.lengths:
                source[place : place + count] = total + torch.arange(count)
                place += count
                source[place : place + length] = row + torch.arange(length)
                kept.append(torch.arange(place, place + length))
                place, row = place + length, row + length
            # filling rows show another one, or where there is none the block's first: nobody reads
            # these
            source[place:end] = row if block.used < block.size else before
            shown = place if place < end else start
            kept.append(torch.full((block.size - block.used,), shown))
            before += block.size
        device = self.blocks[0].gather.device
        return Lengthened(
            documents.to(device),
            source.to(device),
            torch.cat(kept).to(device),
            positions.to(device),
        )


@dataclass(frozen=True, eq=False)
class Lengthened:
    """A row with more rows in front of every document.

    Attributes:
        documents: the new layout, of T' rows.
        source: for each new row the old one that it shows; from the number of old rows on, it is a
            new one, counted from there. (T',)
        kept: for each old row its new place. (T,)
        positions: position_ids (T',), which start anew with every document.
    """

    documents: Documents
    source: Tensor
    kept: Tensor
    positions: Tensor


def lay_out(
    lengths: Sequence[Sequence[int]],
    *,
    both: bool = False,
    behind: Sequence[Sequence[int | None]] | None = None,
) -> tuple[Documents, list[tuple[int, int]], Tensor]:
    """Place the documents of every block one after the other.

    Args:
        lengths: for each block the lengths of its documents.
        both: whether tokens see what comes after them too.
        behind: for each block and document the number of the document in the block that it goes on
            behind, which begins by itself; None, of one or of all: they begin by themselves.

    Returns:
        the layout, the rows (start, end) of each block, and position_ids of shape (T,), which start
        anew with every document, or go on from the end of the one in front of it. Rows that fill a
        block up are at position 0 and belong to no document.
    """
    blocks, rows, positions, start = [], [], [], 0
    for number, documents in enumerate(lengths):
        fronts = behind[number] if behind else [None] * len(documents)
        block = _place(documents, fronts, both)
        position = torch.zeros(block.size, dtype=torch.long)
        first = [0 if front is None else documents[front] for front in fronts]
        position[: block.used] = torch.cat(
            [torch.arange(at, at + length) for at, length in zip(first, documents, strict=True)]
        )
        blocks.append(block)
        positions.append(position)
        rows.append((start, start + block.size))
        start += block.size
    return Documents(tuple(blocks), both), rows, torch.cat(positions)


def _place(lengths: Sequence[int], behind: Sequence[int | None], both: bool) -> Block:
    """A block for documents of these lengths, which lie in its rows in the order given."""
    starts = [0, *accumulate(lengths)]
    used = starts.pop()
    rectangles = _rectangles(lengths, behind, WORTH_A_RECTANGLE[both])
    pads = any(lengths[chosen[0]] > lengths[chosen[-1]] for _, chosen in rectangles)
    # padding shows a filling row; without any, a multiple stays as it is
    size = max(1, -(-(used + pads) // ROW_MULTIPLE)) * ROW_MULTIPLE
    if both:  # more rows than documents, filled up: `last_layer` tells the two by their number
        size = max(size, (-(-len(lengths) // ROW_MULTIPLE) + 1) * ROW_MULTIPLE)
    scatter = torch.zeros(size, dtype=torch.long)
    shapes, gathers, real, fronts, place = [], [], [], [], 0
    for front, chosen in rectangles:
        longest = lengths[chosen[0]]
        own = torch.tensor([lengths[i] for i in chosen])
        padded = both and int(own.min()) < longest
        real.append((torch.arange(longest) < own[:, None])[:, None, None] if padded else None)
        gather = torch.full((len(chosen), longest), used)
        for i, document in enumerate(chosen):
            first, length = starts[document], lengths[document]
            steps = torch.arange(length)
            gather[i, :length] = first + steps
            scatter[first : first + length] = place + i * longest + steps
        shapes.append((len(chosen), longest))
        fronts.append(None if front is None else (starts[front], starts[front] + lengths[front]))
        gathers.append(gather.flatten())
        place += gather.numel()
    return Block(
        tuple(shapes),
        torch.cat(gathers),
        scatter,
        used,
        tuple(lengths),
        tuple(real),
        tuple(fronts),
    )


def _rectangles(
    lengths: Sequence[int], behind: Sequence[int | None], worth: int
) -> list[tuple[int | None, list[int]]]:
    """Documents behind one and the same, or none, longest first, cut where the padding so far would
    have paid for a rectangle.

    The rule of whoever rents until the rent has reached the price: at most twice the best cost.
    """
    found: list[tuple[int | None, list[int]]] = []
    padding = longest = 0
    for front in dict.fromkeys(behind):
        own = [i for i, other in enumerate(behind) if other == front]
        for document in sorted(own, key=lambda i: -lengths[i]):
            fresh = not found or found[-1][0] != front
            if (padding >= worth and lengths[document] < longest) or fresh:
                found.append((front, []))
                padding, longest = 0, lengths[document]
            found[-1][1].append(document)
            padding += longest**2 - lengths[document] ** 2
    return found
