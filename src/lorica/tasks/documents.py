"""Attention for several documents in one flat row: no document sees another.

Everything but attention treats a token by itself, so a batch is laid out as one row of tokens,
without padding between documents. Attention gathers the documents of one adapter into a rectangle,
padded on the right to that adapter's own longest document; with a causal mask the padding is never
seen by a real token. The length comes from the adapter's own documents and not from the whole
batch, because the blocking of the kernels depends on it: that is what keeps training beside others
bitwise equal to training alone.

The function is registered with transformers' attention registry and takes the layout as a keyword
argument that the models hand through. Whether a model really does so, and knows no second path
between tokens, is not looked up in a table: `causal_lm` compares packed with separate once per
model.

Legend: T tokens of the row, H heads, D head width, N documents of a block, L its longest document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lorica_documents"
ROW_MULTIPLE = 32
"""Every adapter's rows are filled up to a multiple of this: matrix kernels treat the last rows of
an odd number differently, and vector loops have a tail."""


@dataclass(frozen=True, eq=False)
class Block:
    """The documents of one adapter: rows of the flat batch, and a rectangle of documents.

    Attributes:
        gather_NL: for every position of every document its row, counted from the block's first;
            padding points at the first filling row.
        scatter: for each row of the block its place in the flattened (N, L) rectangle; filling rows
            point at place 0.
        used: rows that belong to documents; the others fill the block up.
    """

    gather_NL: Tensor
    scatter: Tensor
    used: int

    @property
    def size(self) -> int:
        """Rows of the block."""
        return self.scatter.numel()


@dataclass(frozen=True, eq=False)
class Documents:
    """The layout of a flat row: its blocks, in order, without gaps."""

    blocks: tuple[Block, ...]

    def to(self, device: torch.device) -> Documents:
        return Documents(
            tuple(Block(b.gather_NL.to(device), b.scatter.to(device), b.used) for b in self.blocks)
        )


def lay_out(lengths: Sequence[Sequence[int]]) -> tuple[Documents, list[tuple[int, int]], Tensor]:
    """Place the documents of every block one after the other.

    Args:
        lengths: for each block the lengths of its documents.

    Returns:
        the layout, the rows (start, end) of each block, and position_ids of shape (T,), which start
        anew with every document. Rows that fill a block up are at position 0 and belong to no
        document.
    """
    blocks, rows, positions, start = [], [], [], 0
    for documents in lengths:
        used = sum(documents)
        size = (used // ROW_MULTIPLE + 1) * ROW_MULTIPLE  # there is always a filling row
        longest = max(documents)
        gather = torch.full((len(documents), longest), used)
        scatter = torch.zeros(size, dtype=torch.long)
        position, at = torch.zeros(size, dtype=torch.long), 0
        for i, length in enumerate(documents):
            steps = torch.arange(length)
            gather[i, :length] = at + steps
            scatter[at : at + length] = i * longest + steps
            position[at : at + length] = steps
            at += length
        blocks.append(Block(gather, scatter, used))
        positions.append(position)
        rows.append((start, start + size))
        start += size
    return Documents(tuple(blocks)), rows, torch.cat(positions)


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
    **other: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document.

    Shapes are as transformers hands them: (1, H, T, D) -> (1, T, H, D).

    Semantics: for each document d: out[d] = softmax(causal(query[d] key[d]^T * scaling)) value[d]
    """
    if documents is None or attention_mask is not None:
        extra = other if sliding_window is None else {**other, "sliding_window": sliding_window}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **extra
        )
    unknown = [k for k in ("s_aux", "softcap", "position_bias") if other.get(k) is not None]
    if unknown or not getattr(module, "is_causal", True):
        raise NotSupported(f"attention with {', '.join(unknown) or 'both directions'}")
    sizes = [block.size for block in documents.blocks]
    parts = zip(*(t[0].transpose(0, 1).split(sizes) for t in (query, key, value)), strict=True)
    out = [
        _block(q, k, v, block, scaling, dropout, sliding_window)
        for (q, k, v), block in zip(parts, documents.blocks, strict=True)
    ]
    return torch.cat(out).unsqueeze(0), None


class NotSupported(Exception):
    """Raised in a forward pass of the probe: the model needs what this attention does not do."""


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: Block,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    num, longest = block.gather_NL.shape
    q, k, v = (
        _ToRectangle.apply(t, block).view(num, longest, *t.shape[1:]).transpose(1, 2)
        for t in (q, k, v)
    )
    mask = None
    if window is not None and window < longest:
        steps = torch.arange(longest, device=q.device)
        distance = steps[:, None] - steps[None, :]
        mask = (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and longest > 1,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    rectangle = out.transpose(1, 2).reshape(num * longest, out.shape[1], out.shape[3])
    return _ToRows.apply(rectangle, block)


class _ToRectangle(torch.autograd.Function):
    """Rows of a block (rows, H, D) -> its documents, padded (N L, H, D).

    Both directions of both moves are gathers. Autograd's own gradient of a gather adds into zeros
    row by row, which took a tenth of a step. Padding has no gradient, since nothing real sees it,
    so every row takes the gradient of its one place, and filling rows none.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, block: Block) -> Tensor:
        ctx.block = block
        return rows.index_select(0, block.gather_NL.view(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        back = gradient.index_select(0, ctx.block.scatter)
        back[ctx.block.used :] = 0
        return back, None


class _ToRows(torch.autograd.Function):
    """The way back: (N L, H, D) -> (rows, H, D). Filling rows show the first place, unused."""

    @staticmethod
    def forward(ctx: Any, rectangle: Tensor, block: Block) -> Tensor:
        ctx.block = block
        return rectangle.index_select(0, block.scatter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # padding takes the gradient of a filling row, which is zero: it reaches no loss
        return gradient.index_select(0, ctx.block.gather_NL.view(-1)), None


def _documents_mask(*, attention_mask: Tensor | None = None, **other: Any) -> Tensor | None:
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **other)


AttentionInterface.register(NAME, documents_attention)
AttentionMaskInterface.register(NAME, _documents_mask)
