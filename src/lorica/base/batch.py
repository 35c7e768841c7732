"""What a task tells the adapters of a model about the batch at hand.

Tasks and adapters know nothing of each other, and where a record's prompt ends cannot be seen in
token ids. So it is plain data on the model, in force for a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


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
