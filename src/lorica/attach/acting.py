"""Which virtual tokens act in a forward pass, and before which rows of the batch.

Legend: B rows, P virtual tokens of the row that has most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorica.errors import ActivationError
from lorica.methods.method import Layer


@dataclass(frozen=True)
class Acting:
    """The prompts that act in a forward pass.

    Attributes:
        path: the place, for messages.
        layer: the stack.
        slots: (method, tensors) of those that act on some row.
        rows: for each row of the activation the index of its one, or -1; None: the first on all.
    """

    path: str
    layer: Layer
    slots: tuple[tuple[Any, Mapping[str, Tensor]], ...]
    rows: tuple[int, ...] | None

    @property
    def longest(self) -> int:
        return max(method.num_virtual_tokens for method, _ in self.slots)

    @property
    def even(self) -> bool:
        """Whether all rows have as many virtual tokens."""
        counts = {method.num_virtual_tokens for method, _ in self.slots}
        return len(counts) == 1 and (self.rows is None or -1 not in self.rows)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a cache is marked with, which is good for these virtual tokens only."""
        return tuple(id(tensors) for _, tensors in self.slots), self.rows

    def each(self, batch: int) -> list[int]:
        """The index for every row of a batch, in which beams repeat a row in place."""
        if self.rows is None:
            return [0] * batch
        times, rest = divmod(batch, len(self.rows))
        if rest or not times:
            raise ActivationError(
                f"{self.path}: {len(self.rows)} rows are active, but the batch has {batch}",
                expected="a batch with one entry of the activation per row",
            )
        return [index for index in self.rows for _ in range(times)]

    def counts(self, batch: int, device: torch.device) -> Tensor:
        """Virtual tokens of every row (B,)."""
        sizes = [method.num_virtual_tokens for method, _ in self.slots] + [0]
        return torch.tensor([sizes[index] for index in self.each(batch)], device=device)

    def stacked(self, parts: Sequence[Tensor], batch: int, axis: int) -> Tensor:
        """One part for each prompt, for every row: (B, ...), filled up with zeros in front to P on
        `axis` of a part.
        """
        if self.rows is None:
            return parts[0].expand(batch, *parts[0].shape)
        wide = [_filled(part, self.longest, axis) for part in parts]
        nothing = torch.zeros_like(wide[0])
        return torch.stack([[*wide, nothing][index] for index in self.each(batch)])


def acting(plates: Any, names: Sequence[str]) -> Acting | None:
    """Whose virtual tokens stand in front of which rows; None where those of none.

    Raises:
        ActivationError: a share of a prompt, or two for one row, or prompts and prefixes in one
            batch.
    """
    route = plates.route
    slots = [(plates.slots[name].method, plates.slots[name].tensors) for name in names]
    if route.segments is not None:
        raise ActivationError(f"{plates.path}: virtual tokens train by themselves")
    if route.weights is None:
        return Acting(plates.path, plates.layer, (slots[0],), None)
    columns = [route.names.index(name) for name in names]
    rows = [[row[column] for column in columns] for row in route.table]
    wrong = [row for row in rows if any(w not in (0, 1) for w in row) or sum(row) > 1]
    if wrong:
        raise ActivationError(
            f"{plates.path}: virtual tokens stand before a row or they do not; the weights of "
            f"{', '.join(names)} there are {', '.join(f'{w:g}' for w in wrong[0])}",
            expected="weight 1 for at most one of them in each row",
        )
    chosen = [next((i for i, w in enumerate(row) if w), -1) for row in rows]
    used = sorted({i for i in chosen if i >= 0})
    if not used:
        return None
    if len({hasattr(slots[i][0], "key_values") for i in used}) > 1:
        raise ActivationError(
            f"{plates.path}: prompts and prefixes cannot act in one batch; activate them apart"
        )
    again = {index: place for place, index in enumerate(used)}
    picked = tuple(again.get(index, -1) for index in chosen)
    one = len(used) == 1 and -1 not in picked
    return Acting(plates.path, plates.layer, tuple(slots[i] for i in used), None if one else picked)


def _filled(part: Tensor, size: int, axis: int) -> Tensor:
    """Zeros in front, so that the axis has this size."""
    if part.shape[axis] == size:
        return part
    shape = list(part.shape)
    shape[axis] = size - part.shape[axis]
    return torch.cat([part.new_zeros(shape), part], axis)
