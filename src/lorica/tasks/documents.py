"""Attention for several documents in one flat row: no document sees another.

Everything but attention treats a token by itself, so a batch is laid out as one row of tokens,
without padding between documents. Attention gathers documents of similar length into rectangles,
padded on the right to the longest of each; with a causal mask the padding is never seen by a real
token, and where tokens see both ways a mask hides it. A rectangle holds documents of one adapter
only, because the blocking of the kernels depends on its shape: that is what keeps training beside
others bitwise equal to training alone.

The function is registered with transformers' attention registry and takes the layout as a keyword
argument that the models hand through. Whether a model really does so, and knows no second path
between tokens, is not looked up in a table: `causal_lm` compares packed with separate once per
model.

Legend: T tokens of the row, H heads, D head width, N documents of a rectangle, L its longest
document, P places of all rectangles of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorica.ops.attention import is_short, short_attention

NAME = "lorica_documents"
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
            filling row. (P,)
        scatter: for each row of the block its place; filling rows point at place 0.
        used: rows that belong to documents; the others fill the block up.
        lengths: of its documents, in the order of its rows.
        real: for each rectangle the places that are no padding (N, 1, 1, L), where attention needs
            to be told; None where there is no padding, or where tokens see only what is before
            them.
    """

    shapes: tuple[tuple[int, int], ...]
    gather: Tensor
    scatter: Tensor
    used: int
    lengths: tuple[int, ...]
    real: tuple[Tensor | None, ...]

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
        """The layout with `count` more rows in front of every document."""
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
            source[place:end] = row  # a filling row: there is always one
            kept.append(torch.full((block.size - block.used,), place))
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
    lengths: Sequence[Sequence[int]], *, both: bool = False
) -> tuple[Documents, list[tuple[int, int]], Tensor]:
    """Place the documents of every block one after the other.

    Args:
        lengths: for each block the lengths of its documents.
        both: whether tokens see what comes after them too.

    Returns:
        the layout, the rows (start, end) of each block, and position_ids of shape (T,), which start
        anew with every document. Rows that fill a block up are at position 0 and belong to no
        document.
    """
    blocks, rows, positions, start = [], [], [], 0
    for documents in lengths:
        block = _place(documents, both)
        position = torch.zeros(block.size, dtype=torch.long)
        position[: block.used] = torch.cat([torch.arange(length) for length in documents])
        blocks.append(block)
        positions.append(position)
        rows.append((start, start + block.size))
        start += block.size
    return Documents(tuple(blocks), both), rows, torch.cat(positions)


def _place(lengths: Sequence[int], both: bool) -> Block:
    """A block for documents of these lengths, which lie in its rows in the order given."""
    starts = [0, *accumulate(lengths)]
    used = starts.pop()
    size = (used // ROW_MULTIPLE + 1) * ROW_MULTIPLE  # there is always a filling row
    if both:  # more rows than documents, filled up: `last_layer` tells the two by their number
        size = max(size, (-(-len(lengths) // ROW_MULTIPLE) + 1) * ROW_MULTIPLE)
    scatter = torch.zeros(size, dtype=torch.long)
    shapes, gathers, real, place = [], [], [], 0
    for chosen in _rectangles(lengths, WORTH_A_RECTANGLE[both]):
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
        gathers.append(gather.flatten())
        place += gather.numel()
    return Block(tuple(shapes), torch.cat(gathers), scatter, used, tuple(lengths), tuple(real))


def _rectangles(lengths: Sequence[int], worth: int) -> list[list[int]]:
    """Documents, longest first, cut where the padding so far would have paid for a rectangle.

    The rule of whoever rents until the rent has reached the price: at most twice the best cost.
    """
    found: list[list[int]] = []
    padding, longest = worth, 0
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if (padding >= worth and lengths[document] < longest) or not found:
            found.append([])
            padding, longest = 0, lengths[document]
        found[-1].append(document)
        padding += longest**2 - lengths[document] ** 2
    return found


def documents_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    prefix_gate: Tensor | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention inside each document, causal where that of the layer is.

    Shapes are as transformers hands them: (1, H, T, D) -> (1, T, H, D). Where there are more keys
    and values than queries, the first ones are a prefix that every document sees; with
    `prefix_gate` (T, 1) multiplied by a number that is the same on all rows of a document.

    Semantics: for each document d: out[d] = softmax(causal(query[d] key[d]^T * scaling)) value[d]

    Raises:
        NotSupported: the layer wants more of attention than this.
    """
    if documents is None or attention_mask is not None:
        extra = other if sliding_window is None else {**other, "sliding_window": sliding_window}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **extra
        )
    unknown = [k for k in ("s_aux", "softcap", "position_bias") if other.get(k) is not None]
    causal = getattr(module, "is_causal", True)
    if unknown or causal is documents.both:
        direction = "one direction" if causal else "both directions"
        raise NotSupported(f"attention with {', '.join(unknown) or direction}")
    sizes = [block.size for block in documents.blocks]
    prefix = key.shape[2] - query.shape[2]
    before = key[0, :, :prefix], value[0, :, :prefix]
    rows = query, key[:, :, prefix:], value[:, :, prefix:]
    parts = zip(*(t[0].transpose(0, 1).split(sizes) for t in rows), strict=True)
    how = _How(scaling, dropout, sliding_window, before if prefix else None, documents.both)
    gates = [None] * len(sizes) if prefix_gate is None else prefix_gate.split(sizes)
    out = [
        _block(q, k, v, block, how, gate)
        for (q, k, v), block, gate in zip(parts, documents.blocks, gates, strict=True)
    ]
    made = torch.cat(out).unsqueeze(0)
    if documents.seen is not None:
        documents.seen.append((module, made))
    return made, None


class NotSupported(Exception):
    """Raised in a forward pass of the probe: the model needs what this attention does not do."""


@dataclass(frozen=True)
class _How:
    """Arguments of attention; `before`: keys and values (H, P, D) that every document sees."""

    scaling: float | None
    dropout: float
    window: int | None
    before: tuple[Tensor, Tensor] | None
    both: bool


def _block(q: Tensor, k: Tensor, v: Tensor, block: Block, how: _How, gate: Tensor | None) -> Tensor:
    places = [_ToPlaces.apply(t, block) for t in (q, k, v)]
    sizes = [num * longest for num, longest in block.shapes]
    rows = block.gather.split(sizes)
    out = [
        _rectangle(
            tuple(t.view(*shape, *t.shape[1:]) for t in parts),
            how,
            real,
            None if gate is None else gate.index_select(0, own.view(shape)[:, 0]),
        )
        for shape, own, real, *parts in zip(
            block.shapes, rows, block.real, *(p.split(sizes) for p in places), strict=True
        )
    ]
    return _ToRows.apply(out[0] if len(out) == 1 else torch.cat(out), block)


def _rectangle(
    parts: tuple[Tensor, ...], how: _How, real: Tensor | None, gate: Tensor | None
) -> Tensor:
    """Attention of N documents: three of (N, L, H, D), prefix gates (N, 1) -> (N L, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in parts)
    longest, prefix = q.shape[2], 0
    if how.before is not None:
        prefix = how.before[0].shape[1]
        k, v = (
            torch.cat([_opened(front.expand(own.shape[0], -1, -1, -1), gate), own], 2)
            for front, own in zip(how.before, (k, v), strict=True)
        )
    mask = _mask(longest, prefix, how, q.device)
    if real is not None:
        real = F.pad(real, (prefix, 0), value=True)
        own = torch.eye(longest, dtype=torch.bool, device=q.device)  # no query sees nothing
        own = F.pad(own, (prefix, 0), value=False)
        mask = real if mask is None else mask & real | own
    if how.both and not how.dropout and is_short(q, k):
        scale = q.shape[-1] ** -0.5 if how.scaling is None else how.scaling
        return short_attention(q, k, v, mask, scale).transpose(1, 2).flatten(0, 1)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and longest > 1 and not how.both,
        scale=how.scaling,
        dropout_p=how.dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2).flatten(0, 1)


def _opened(prefix: Tensor, gate: Tensor | None) -> Tensor:
    """Keys or values (N, H, P, D), each document's multiplied by its gate."""
    return prefix if gate is None else prefix * gate[:, :, None, None].to(prefix.dtype)


def _mask(longest: int, prefix: int, how: _How, device: torch.device) -> Tensor | None:
    """Which of its keys (prefix + L) a query (L) sees, where the kernels do not know by
    themselves.
    """
    window = longest if how.window is None else min(how.window, longest)
    if window == longest and (how.both or not prefix):
        return None
    steps = torch.arange(longest, device=device)
    distance = steps[:, None] - torch.arange(-prefix, longest, device=device)[None, :]
    mask = torch.ones_like(distance, dtype=torch.bool) if how.both else distance >= 0
    return mask & (distance.abs() < window) if window < longest else mask


class _ToPlaces(torch.autograd.Function):
    """Rows of a block (rows, H, D) -> the places of its rectangles (P, H, D).

    Both directions of both moves are gathers. Autograd's own gradient of a gather adds into zeros
    row by row, which took a tenth of a step. Padding has no gradient, since nothing real sees it,
    so every row takes the gradient of its one place, and filling rows none.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, block: Block) -> Tensor:
        ctx.block = block
        return rows.index_select(0, block.gather)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        back = gradient.index_select(0, ctx.block.scatter)
        back[ctx.block.used :] = 0
        return back, None


class _ToRows(torch.autograd.Function):
    """The way back: (P, H, D) -> (rows, H, D). Filling rows show the first place, unused."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, block: Block) -> Tensor:
        ctx.block = block
        return places.index_select(0, block.scatter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # padding takes the gradient of a filling row, which is zero: it reaches no loss
        return gradient.index_select(0, ctx.block.gather), None


def _documents_mask(*, attention_mask: Tensor | None = None, **other: Any) -> Tensor | None:
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **other)


AttentionInterface.register(NAME, documents_attention)
AttentionMaskInterface.register(NAME, _documents_mask)
