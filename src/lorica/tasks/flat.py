"""Examples of language models in one flat row, without padding between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorica.data.encode import IGNORED, Example
from lorica.tasks.beginnings import Beginning
from lorica.tasks.last_layer import keep_rows
from lorica.tasks.layout import lay_out
from lorica.tasks.task import Batch


@dataclass(frozen=True)
class _Stretch:
    """Rows that lie together: an example, what some begin with, or the rest of one of these.

    Attributes:
        targets: the label of the next token at every row.
        behind: number of the stretch of its block that it goes on behind; None for a beginning.
    """

    ids: Sequence[int]
    targets: Sequence[int]
    behind: int | None = None


def flat_batch(
    blocks: Sequence[Sequence[Example]],
    device: torch.device,
    *,
    keeps: bool,
    alike: Sequence[Sequence[Beginning]] = (),
) -> Batch:
    """The examples of every block one after the other in one flat row.

    Args:
        keeps: whether only rows with a label go through all of the last layer.
        alike: for each block what its examples begin with in common, to lie there once; nothing
            where nothing is said.
    """
    stretches = [
        _stretches(block, common)
        for block, common in zip(blocks, alike or [()] * len(blocks), strict=True)
    ]
    documents, rows, positions = lay_out(
        [[len(s.ids) for s in block] for block in stretches],
        behind=[[s.behind for s in block] for block in stretches],
    )
    ids = torch.zeros(len(positions), dtype=torch.long)
    targets = torch.full((len(positions),), IGNORED)
    for (start, _), block in zip(rows, stretches, strict=True):
        flat = [i for s in block for i in s.ids]
        end = start + len(flat)
        ids[start:end] = torch.tensor(flat)
        targets[start:end] = torch.tensor([t for s in block for t in s.targets])
    wanted = [(targets[start:end] != IGNORED).nonzero().flatten() for start, end in rows]
    keep = [start + own for (start, _), own in zip(rows, wanted, strict=True)]
    kept = keep_rows(documents, wanted) if keeps else None
    inputs = {
        "input_ids": ids[None].to(device),
        "position_ids": positions[None].to(device),
        "documents": documents.to(device),
    }
    labels = tuple(targets[k].to(device) for k in keep)
    prompts = tuple(example.num_prompt for block in blocks for example in block)
    kept = None if kept is None else kept.to(device)
    return Batch(inputs, labels, tuple(k.to(device) for k in keep), tuple(rows), prompts, kept)


def shifted(labels: Sequence[int]) -> list[int]:
    """The label of the next token at every position; the last position has none."""
    return [*labels[1:], IGNORED]


def _stretches(block: Sequence[Example], common: Sequence[Beginning]) -> list[_Stretch]:
    """The stretches of a block, in the order of its examples: labels are told apart by that. A
    beginning lies in front of the first example that has it.
    """
    of_example = {i: one for one in common for i in one.members}
    found: list[_Stretch] = []
    place = {}
    for number, example in enumerate(block):
        ids, targets, own = example.input_ids, shifted(example.labels), of_example.get(number)
        if own is None:
            found.append(_Stretch(ids, targets))
            continue
        if own not in place:
            place[own] = len(found)
            found.append(_Stretch(ids[: own.length], targets[: own.length]))
        found.append(_Stretch(ids[own.length :], targets[own.length :], place[own]))
    return found
