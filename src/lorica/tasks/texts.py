"""Texts that are classified, beside each other in one flat row, as an encoder is given them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorica.tasks.last_layer import Kept, keep_rows
from lorica.tasks.layout import lay_out
from lorica.tasks.task import device_of, first_position


def takes_segments(model: nn.Module) -> bool:
    """Whether it tells the second text of a pair from the first."""
    config: Any = getattr(model, "config", None)
    return _takes("token_type_ids", model) and getattr(config, "type_vocab_size", 0) > 1


def text_inputs(
    ids: Sequence[Sequence[Sequence[int]]],
    segments: Sequence[Sequence[Sequence[int]]],
    model: nn.Module,
) -> tuple[dict[str, Any], tuple[tuple[int, int], ...], Kept]:
    """Inputs of `model` for texts without padding between them.

    Args:
        ids: for each block the token ids of its texts.
        segments: for each text the segment of every token; none where it has one only.

    Returns:
        the inputs, the rows (start, end) of each block, and the first row of every text, which is
        what goes on behind the last layer.
    """
    documents, rows, positions = lay_out([[*map(len, block)] for block in ids], both=True)
    first = getattr(getattr(model, "config", None), "max_position_embeddings", 0)
    flat = torch.zeros(len(positions), dtype=torch.long)
    kinds = torch.zeros_like(flat)
    wanted = []
    for (start, _), block, parts in zip(rows, ids, segments, strict=True):
        lengths = torch.tensor([len(text) for text in block])
        ends = start + lengths.cumsum(0)
        flat[start : ends[-1]] = torch.tensor([i for text in block for i in text])
        full = [part or (0,) * len(text) for part, text in zip(parts, block, strict=True)]
        kinds[start : ends[-1]] = torch.tensor([i for part in full for i in part])
        wanted.append(ends - lengths - start)
    kept = keep_rows(documents, wanted, texts=True)
    assert kept is not None
    device = device_of(model)
    inputs: dict[str, Any] = {"input_ids": flat[None].to(device), "documents": documents.to(device)}
    if _takes("position_ids", model):
        inputs["position_ids"] = (positions + first_position(model, first))[None].to(device)
    if _takes("token_type_ids", model):  # also where it knows one kind: else it looks for as many
        inputs["token_type_ids"] = kinds[None].to(device)
    return inputs, tuple(rows), kept.to(device)


def _takes(name: str, model: nn.Module) -> bool:
    return name in inspect.signature(type(model).forward).parameters
