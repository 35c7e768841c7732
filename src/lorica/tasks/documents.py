"""Attention for several documents in one flat row: no document sees another.

Everything but attention treats a token by itself, so a batch is laid out as one row of tokens, without padding
between documents. Attention gathers the documents of one adapter into a rectangle, padded on the right to that
adapter's own longest document; with a causal mask the padding is never seen by a real token. The length comes
from the adapter's own documents and not from the whole batch, because the blocking of the kernels depends on it:
that is what keeps training beside others bitwise equal to training alone.

The function is registered with transformers' attention registry and takes the layout as a keyword argument that
the models hand through. Whether a model really does so, and knows no second path between tokens, is not looked
up in a table: `causal_lm` compares packed with separate once per model.

Legend: T tokens of the row, H heads, D head width, N documents of a block, L its longest document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "lorica_documents"
ROW_MULTIPLE = 32
"""Every adapter's rows are filled up to a multiple of this: matrix kernels treat the last rows of an odd
number differently, and vector loops have a tail."""


@dataclass(frozen=True, eq=False)
class Block:
    """The documents of one adapter inside the row.

    Attributes:
        gather_NL: row of every position of every document; padding repeats the document's last row.
        scatter: for each row of the block, its place in the flattened (N, L) rectangle.
    """

    gather_NL: Tensor
    scatter: Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """The layout of a flat row: its blocks, in order, without gaps."""

    blocks: tuple[Block, ...]

    def to(self, device: torch.device) -> Documents:
        return Documents(
            tuple(Block(b.gather_NL.to(device), b.scatter.to(device)) for b in self.blocks)
        )


def lay_out(lengths: Sequence[Sequence[int]]) -> tuple[Documents, list[tuple[int, int]], Tensor]:
    """Place the documents of every block one after the other.

    Args:
        lengths: for each block the lengths of its documents.

    Returns:
        the layout, the rows (start, end) of each block, and position_ids of shape (T,), which start anew with
        every document. Rows that fill a block up are at position 0 and belong to no document.
    """
    blocks, rows, positions, start = [], [], [], 0
    for documents in lengths:
        used = sum(documents)
        size = -(-used // ROW_MULTIPLE) * ROW_MULTIPLE
        longest = max(documents)
        gather = torch.empty(len(documents), longest, dtype=torch.long)
        scatter = torch.zeros(size, dtype=torch.long)  # filling rows show document 0's first row
        position, at = torch.zeros(size, dtype=torch.long), 0
        for i, length in enumerate(documents):
            steps = torch.arange(longest)
            gather[i] = start + at + steps.clamp(max=length - 1)
            scatter[at : at + length] = i * longest + steps[:length]
            position[at : at + length] = steps[:length]
            at += length
        blocks.append(Block(gather, scatter))
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
    """Causal attention inside each document. Shapes as transformers hands them: (1, H, T, D) -> (1, T, H, D).

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
    q_THD, k_THD, v_THD = (t[0].transpose(0, 1) for t in (query, key, value))
    out = [
        _block(q_THD, k_THD, v_THD, b, scaling, dropout, sliding_window) for b in documents.blocks
    ]
    return torch.cat(out).unsqueeze(0), None


class NotSupported(Exception):
    """Raised inside a forward pass of the probe: the model needs what this attention does not do."""


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
    index = block.gather_NL.reshape(-1)
    q, k, v = (
        t.index_select(0, index).view(num, longest, *t.shape[1:]).transpose(1, 2) for t in (q, k, v)
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
    return (
        out.transpose(1, 2)
        .reshape(num * longest, out.shape[1], out.shape[3])
        .index_select(0, block.scatter)
    )


def _documents_mask(*, attention_mask: Tensor | None = None, **other: Any) -> Tensor | None:
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **other)


AttentionInterface.register(NAME, documents_attention)
AttentionMaskInterface.register(NAME, _documents_mask)
