"""Attention for several documents in one flat row: no document sees another.

Everything but attention treats a token by itself. Attention gathers documents of similar length
into the rectangles of a layout (`layout`), padded on the right to the longest of each; with a
causal mask the padding is never seen by a real token, and where tokens see both ways a mask hides
it. Documents that go on behind another one see all of that one too.

The function is registered with transformers' attention registry and takes the layout as a keyword
argument that the models hand through. Whether a model really does so, and knows no second path
between tokens, is not looked up in a table: `causal_lm` compares packed with separate once per
model.

Legend: T tokens of the row, H heads, D head width, N documents of a rectangle, L its longest
document, P places of all rectangles of a block.
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

from lorica.ops.attention import is_narrow, is_short, narrow_attention, short_attention
from lorica.tasks.layout import Block, Documents

NAME = "lorica_documents"


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
    before = (key[0, :, :prefix], value[0, :, :prefix]) if prefix else None
    rows = query, key[:, :, prefix:], value[:, :, prefix:]
    parts = zip(*(_split(t[0].transpose(0, 1), sizes) for t in rows), strict=True)
    how = _How(scaling, dropout, sliding_window, documents.both)
    gates = [None] * len(sizes) if prefix_gate is None else prefix_gate.split(sizes)
    out = [
        _block(q, k, v, block, how, before, gate)
        for (q, k, v), block, gate in zip(parts, documents.blocks, gates, strict=True)
    ]
    made = _joined(out).unsqueeze(0)
    if documents.seen is not None:
        documents.seen.append((module, made))
    return made, None


class NotSupported(Exception):
    """Raised in a forward pass of the probe: the model needs what this attention does not do."""


@dataclass(frozen=True)
class _How:
    """Arguments of attention."""

    scaling: float | None
    dropout: float
    window: int | None
    both: bool


Front = tuple[Tensor, Tensor]
"""Keys and values (H, F, D) that all documents of a rectangle see."""


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: Block,
    how: _How,
    before: Front | None,
    gate: Tensor | None,
) -> Tensor:
    places = [_ToPlaces.apply(t, block) for t in (q, k, v)]
    sizes = [num * longest for num, longest in block.shapes]
    rows = block.gather.split(sizes)
    parts = zip(*(_split(p, sizes) for p in places), strict=True)
    out = [
        _rectangle(
            tuple(t.view(*shape, *t.shape[1:]) for t in part),
            how,
            real,
            before if front is None else (_rows(k, front), _rows(v, front)),
            None if gate is None else gate.index_select(0, own.view(shape)[:, 0]),
            near=front is not None,
        )
        for shape, own, real, front, part in zip(
            block.shapes, rows, block.real, block.fronts, parts, strict=True
        )
    ]
    return _ToRows.apply(_joined(out), block)


def _split(rows: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Parts of these sizes. The gradient of a part that is all would be a copy."""
    return (rows,) if len(sizes) == 1 else rows.split(list(sizes))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _rows(values: Tensor, front: tuple[int, int]) -> Tensor:
    """Rows of a block (rows, H, D) as what documents have in front of them: (H, F, D)."""
    return values[slice(*front)].transpose(0, 1)


def _rectangle(
    parts: tuple[Tensor, ...],
    how: _How,
    real: Tensor | None,
    before: Front | None,
    gate: Tensor | None,
    *,
    near: bool,
) -> Tensor:
    """Attention of N documents: three of (N, L, H, D), prefix gates (N, 1) -> (N L, H, D).

    Args:
        near: whether `before` are the tokens just in front of each document, which count in a
            window of attention; else all of it is seen.
    """
    q, k, v = (t.transpose(1, 2) for t in parts)
    longest, front = q.shape[2], 0
    if before is not None:
        front = before[0].shape[1]
        k, v = (
            torch.cat([_opened(shared.expand(own.shape[0], -1, -1, -1), gate), own], 2)
            for shared, own in zip(before, (k, v), strict=True)
        )
    mask = _mask(longest, front, how, q.device, near=near)
    if real is not None:
        real = F.pad(real, (front, 0), value=True)
        own = torch.eye(longest, dtype=torch.bool, device=q.device)  # no query sees nothing
        own = F.pad(own, (front, 0), value=False)
        mask = real if mask is None else mask & real | own
    if how.both and not how.dropout and is_short(q, k, v):
        scale = q.shape[-1] ** -0.5 if how.scaling is None else how.scaling
        return short_attention(q, k, v, mask, scale).transpose(1, 2).flatten(0, 1)
    causal = mask is None and longest > 1 and not how.both
    if not how.dropout and is_narrow(q, k, v):
        out = narrow_attention(q, k, v, mask, how.scaling, causal=causal)
        return out.transpose(1, 2).flatten(0, 1)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal,
        scale=how.scaling,
        dropout_p=how.dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2).flatten(0, 1)


def _opened(prefix: Tensor, gate: Tensor | None) -> Tensor:
    """Keys or values (N, H, P, D), each document's multiplied by its gate."""
    return prefix if gate is None else prefix * gate[:, :, None, None].to(prefix.dtype)


def _mask(
    longest: int, front: int, how: _How, device: torch.device, *, near: bool
) -> Tensor | None:
    """Which of its keys (front + L) a query (L) sees, where the kernels do not know by
    themselves.
    """
    whole = longest + front * near
    window = whole if how.window is None else min(how.window, whole)
    if window == whole and (how.both or not front):
        return None
    steps = torch.arange(longest, device=device)
    distance = steps[:, None] - torch.arange(-front, longest, device=device)[None, :]
    mask = torch.ones_like(distance, dtype=torch.bool) if how.both else distance >= 0
    return mask & (distance.abs() < window) if window < whole else mask


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
