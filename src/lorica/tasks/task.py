"""What every task answers: how a record becomes numbers, what the loss is, what the model says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lorica.data.encode import Encoded, Example


@dataclass(frozen=True)
class Prediction:
    """What a model said about one record, with what is needed to score it.

    Attributes:
        record: the record, in its canonical shape.
        nll: summed negative log-likelihood (nats) of the trained tokens under teacher forcing; nan
            where it was not computed.
        num_tokens: how many tokens `nll` sums over (1 for a classification).
        output: the generated text, or the index of the predicted label; None where not generated.
        references: the acceptable outputs, or the index of the one true label.
    """

    record: dict
    nll: float
    num_tokens: int
    output: str | int | None
    references: tuple[str | int, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward pass is given.

    Attributes:
        inputs: keyword arguments of the model.
        labels: one tensor per block: the label of every kept row, or of every record.
        keep: one tensor per block: rows of the flattened hidden states that carry a label.
        rows: (start, end) of each block in the flat row; None where the batch is padded and has one block.
        num_tokens: real tokens, without padding.
    """

    inputs: dict[str, Any]
    labels: tuple[Tensor, ...]
    keep: tuple[Tensor, ...] = ()
    rows: tuple[tuple[int, int], ...] | None = None
    num_tokens: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """What an example, a loss and a score are. A block is the examples of one adapter."""

    kind: ClassVar[str]

    def encode(self, records: Sequence[dict]) -> Encoded:
        """Records as token ids and labels. Raises one DataError that names all records of no use."""
        ...

    def facts(self) -> dict[str, Any]:
        """What must be the same when the adapter is used as when it was trained; goes with its files."""
        ...

    def shares(self, model: nn.Module) -> bool:
        """Whether the blocks of several adapters can go through `model` in one pass."""
        ...

    def collate(self, blocks: Sequence[Sequence[Example]], model: nn.Module) -> Batch:
        """The examples of each block as one batch; more than one block only where `shares` says so."""
        ...

    def running(self, model: nn.Module) -> AbstractContextManager:
        """What must hold from the forward pass to the end of the backward pass, which may recompute."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """For each block the summed negative log-likelihood (nats) of its labels, float32, with gradients."""
        ...

    def predict(
        self,
        model: nn.Module,
        records: Sequence[dict],
        *,
        batch_size: int = 32,
        generate: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """What the model, as it is activated now, says about each record. `progress` is told how many are done."""
        ...


def pad(sequences: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Sequences as one (records, longest) tensor, filled up with `value`."""
    longest = max(len(s) for s in sequences)
    rows = [
        [value] * (longest - len(s)) + list(s) if left else list(s) + [value] * (longest - len(s))
        for s in sequences
    ]
    return torch.tensor(rows, dtype=torch.long)


def mask_of(sequences: Sequence[Sequence[int]], *, left: bool = False) -> Tensor:
    """1 where `pad` put a token of the sequence and 0 where it filled up. By position, never by token id."""
    return pad([[1] * len(s) for s in sequences], 0, left=left)


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs of `model` belong."""
    return next(model.parameters()).device


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, so that a too large batch fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
