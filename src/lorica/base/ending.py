"""The token that ends a text: choosing it, and whether a model can learn to say it.

A base whose pretraining never saw its end token may hold for it the same output row as for all
unused tokens. With the output layer frozen, their logits then move together: no adapter can make
the model prefer the end token, and generation runs on to its limit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorica.errors import BaseModelError, nearest

TWIN_DISTANCE = 0.1
"""Rows closer than this share of their own length are taken for the same."""


def set_end_token(model: nn.Module | None, tokenizer: Any, token: str) -> None:
    """End texts with `token` from now on, in training and, where there is a model, in generation.

    Raises:
        BaseModelError: the tokenizer does not know the token.
    """
    known = tokenizer.get_vocab()
    if token not in known:
        raise BaseModelError(
            f"the tokenizer has no token {token!r} to end texts with",
            expected=f"one of its special tokens: {', '.join(tokenizer.all_special_tokens)}",
            mend=f"did you mean {near!r}?" if (near := nearest(token, known)) else None,
        )
    tokenizer.eos_token = token
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.eos_token_id = known[token]


@torch.no_grad()
def end_token_note(model: Any, tokenizer: Any) -> str | None:
    """What to tell where other tokens have the end token's output row; None where all is well."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    end = tokenizer.eos_token_id
    if head is None or end is None or head.weight.is_meta or end >= len(head.weight):
        return None
    rows = head.weight.float()
    distances = torch.linalg.vector_norm(rows - rows[end], dim=1)
    twins = int((distances < TWIN_DISTANCE * torch.linalg.vector_norm(rows[end])).sum()) - 1
    if twins < 1:
        return None
    return (
        f"{twins} other tokens have almost the same output row as the end token "
        f"{tokenizer.eos_token!r}: the base never saw it, and an adapter cannot learn to end a "
        "text with it; name one that it saw with eos_token, or adapt the output layer"
    )
