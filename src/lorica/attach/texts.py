"""Which tokens of a forward pass belong to which text, and how far its prompt goes.

It can only be seen where the stack of layers is called: from masks, the layout of documents, and
what the task told of the batch (`base.batch`), since where a prompt ends cannot be seen in token
ids. A call without a cache, of which no task told anything, is taken as one prompt.

Legend: B rows, L tokens of a row, T tokens of a flat row of documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.stack import takes
from lorica.errors import ActivationError


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of a batch: its rows (B, L), or the documents of a flat row (1, T).

    Attributes:
        place: the number of every token in its text; -1 for padding.
        sizes: how many tokens the prompt of its text has, shaped to be compared with `place`.
        numbers: the text of every token, in the shape of `place`; that of padding does not matter.
        count: how many texts there are.
    """

    place: Tensor
    sizes: Tensor
    numbers: Tensor
    count: int

    @property
    def prompts(self) -> Tensor:
        """Which tokens belong to the prompt of their text, in the shape of `place`."""
        return (self.place >= 0) & (self.place < self.sizes)


def texts_of(
    module: nn.Module, path: str, told: Sequence[int] | None, args: tuple, kwargs: Mapping[str, Any]
) -> Texts | None:
    """The texts that a stack is given; None where a cache is filled: then the prompt is over.

    Args:
        path: of the stack, for messages.
        told: tokens of the prompt of every text; None where all that there is is prompt.

    Raises:
        ActivationError: no text has a prompt, or what the task told does not fit the batch.
    """
    values = {**dict(zip(takes(module), args, strict=False)), **kwargs}
    cache = values.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        return None
    if told is not None and max(told) <= 1:
        raise ActivationError(
            f"{path}: the records have no prompt, and the adapter looks at prompts only",
            mend="give records with prompts, and train_on: completion",
        )
    given = values.get("input_ids")
    given = values["inputs_embeds"] if given is None else given
    if "documents" in values:
        return _in_documents(values, told, given.device)
    return _in_rows(path, values.get("attention_mask"), told, given)


def _in_rows(path: str, mask: Tensor | None, told: Sequence[int] | None, given: Tensor) -> Texts:
    if mask is not None and mask.dim() != 2:
        raise ActivationError(
            f"{path}: prompts cannot be found in an attention mask of {mask.dim()} dimensions",
            expected="a mask (rows, tokens)",
            mend="with generate: leave cache_implementation out",
        )
    if mask is None:
        mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
    real = mask != 0
    place = (real.cumsum(1) - 1).masked_fill(~real, -1)
    rows = given.shape[0]
    numbers = torch.arange(rows, device=given.device)[:, None].expand(place.shape)
    if told is None:
        return Texts(place, real.sum(1, keepdim=True), numbers, rows)
    if len(told) != rows:
        raise ActivationError(f"{path}: {len(told)} prompts were told, for {rows} rows")
    return Texts(place, torch.tensor(told, device=given.device)[:, None], numbers, rows)


def _in_documents(
    values: Mapping[str, Any], told: Sequence[int] | None, device: torch.device
) -> Texts:
    blocks = values["documents"].blocks
    lengths = [length for block in blocks for length in block.lengths]
    prompts = lengths if told is None else told
    place, sizes, numbers, number = [], [], [], 0
    for block in blocks:
        for length in block.lengths:
            place += range(length)
            sizes += [prompts[number]] * length
            numbers += [number] * length
            number += 1
        filling = block.size - block.used
        place += [-1] * filling
        sizes += [0] * filling
        numbers += [number - 1] * filling
    made = (torch.tensor(part, device=device)[None] for part in (place, sizes, numbers))
    return Texts(*made, count=number)
