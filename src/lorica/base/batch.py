"""What a task tells the adapters of a model about the batch at hand.

Tasks and adapters know nothing of each other, and where a record's prompt ends cannot be seen in
token ids. So it is plain data on the model, in force for a forward pass. So are the rows of each
adapter where several share a pass, for parts of the base that must see these apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_BLOCKS = "_lorica_blocks"


@contextmanager
def telling(model: nn.Module, prompts: Sequence[int] | None) -> Iterator[None]:
    """Say for a forward pass how long the prompts are.

    Args:
        prompts: tokens of every record's prompt, in the order of the rows, or of the documents of
            a row; None where all that a record has is prompt.
    """
    attached: Any = getattr(model, "_orig_mod", model).__dict__.get("_lorica_attached")
    if attached is None:
        yield
        return
    before, attached.status.prompts = attached.status.prompts, prompts
    try:
        yield
    finally:
        attached.status.prompts = before


@contextmanager
def beside(model: nn.Module, *ranges: Sequence[tuple[int, int]] | None) -> Iterator[None]:
    """Say for a pass, forward and backward, which rows belong to which adapter.

    Args:
        ranges: rows (start, end) of each, in order and without gaps; once more of those that go on
            behind the last attention, where these are fewer. None is passed over.
    """
    own = getattr(model, "_orig_mod", model).__dict__
    before = own.get(_BLOCKS, {})
    own[_BLOCKS] = {r[-1][1]: tuple(end - start for start, end in r) for r in ranges if r}
    try:
        yield
    finally:
        own[_BLOCKS] = before


def blocks(model: nn.Module, x: Tensor) -> tuple[int, ...]:
    """How many rows of `x`, (..., D), each adapter of the pass has; empty where all may be given to
    a function at once: those of one adapter, in one thread, which leaves nothing over of 32 rows
    and an even number of features, or on a GPU, where no bits are promised.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return ()
    if torch.get_num_threads() == 1 and x.shape[-1] % 2 == 0:
        return ()
    sizes = model.__dict__.get(_BLOCKS, {}).get(x.shape[:-1].numel(), ())
    return sizes if len(sizes) > 1 else ()
