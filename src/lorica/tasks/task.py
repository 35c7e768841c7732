"""What every task answers: how a record becomes numbers, what the loss is, what the model says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from lorica.data.encode import Encoded, Example, Progress
from lorica.data.encoded_cache import Encoding
from lorica.tasks.last_layer import Kept


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
        num_cut: tokens cut off the left of what was asked, to leave room for the answer.
    """

    record: dict
    nll: float
    num_tokens: int
    output: str | int | None
    references: tuple[str | int, ...]
    num_cut: int = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward pass is given.

    Attributes:
        inputs: keyword arguments of the model.
        labels: one tensor per block: the label of every kept row, or of every record.
        keep: one tensor per block: rows of the flattened hidden states that carry a label.
        rows: (start, end) of each block in the flat row; None where the batch is padded and has one
            block.
        prompts: tokens before the first label of every record; None where a record is all prompt.
        kept: the rows that go on behind the attention of the last layer; None: all.
    """

    inputs: dict[str, Any]
    labels: tuple[Tensor, ...]
    keep: tuple[Tensor, ...] = ()
    rows: tuple[tuple[int, int], ...] | None = None
    prompts: tuple[int, ...] | None = None
    kept: Kept | None = None


class Task(Protocol):
    """What an example, a loss and a score are. A block is the examples of one adapter."""

    kind: ClassVar[str]
    notes: list[str]
    """What the user should be told, found out so far."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the base."""
        ...

    def encode(self, records: Sequence[dict], *, progress: Progress | None = None) -> Encoded:
        """Records as token ids and labels. Raises one DataError for all useless records.

        Args:
            progress: is told about how many are done, where that takes long.
        """
        ...

    def encoding(self) -> Encoding:
        """What decides about the outcome of `encode` beside the records."""
        ...

    def facts(self) -> dict[str, Any]:
        """What must be the same when the adapter is used as when it was trained; goes with its
        files.
        """
        ...

    def shares(self, model: nn.Module) -> bool:
        """Whether the blocks of several adapters can go through `model` in one pass."""
        ...

    def pads(self, model: nn.Module) -> bool:
        """Whether short examples of a batch are filled up to its longest: then similar lengths
        belong together.
        """
        ...

    def collate(self, blocks: Sequence[Sequence[Example]], model: nn.Module) -> Batch:
        """The examples of each block as one batch; several blocks only where `shares` says so."""
        ...

    def rectangle(self, examples: Sequence[Example], model: nn.Module) -> dict[str, Tensor]:
        """Inputs of `model` for records beside each other, filled up on the right to the longest,
        so that no token sees what fills up.
        """
        ...

    def running(self, model: nn.Module) -> AbstractContextManager:
        """What must hold from the forward pass to the end of the backward pass, which may
        recompute.
        """
        ...

    def losses(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """For each block the summed negative log-likelihood (nats) of its labels, in float32 or
        wider, with gradients.
        """
        ...

    def each_loss(
        self, model: nn.Module, batch: Batch, blocks: Sequence[Sequence[Example]]
    ) -> list[list[float]]:
        """For each block of `batch` the summed negative log-likelihood (nats) of every example."""
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
        """What the model, as it is activated now, says about each record. `progress` is told how
        many are done.
        """
        ...


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients, for a while."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def pad(sequences: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Sequences as one (records, longest) tensor, filled up with `value`."""
    longest = max(len(s) for s in sequences)
    rows = [
        [value] * (longest - len(s)) + list(s) if left else list(s) + [value] * (longest - len(s))
        for s in sequences
    ]
    return torch.tensor(rows, dtype=torch.long)


def mask_of(sequences: Sequence[Sequence[int]], *, left: bool = False) -> Tensor:
    """1 where `pad` put a token of the sequence and 0 where it filled up. By position, never by
    token id.
    """
    return pad([[1] * len(s) for s in sequences], 0, left=left)


def filler(model: nn.Module, tokenizer: Any) -> int:
    """The token id that fills rows up. The model's own comes first: some read positions or the last
    token off it.
    """
    config: Any = getattr(model, "config", None)
    own = config.get_text_config().pad_token_id if config is not None else None
    known = (own, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None and token >= 0), 0)


def num_positions(model: nn.Module, *, virtual: int = 0) -> int | None:
    """The longest input that a model has positions for, beside the virtual tokens of its adapters;
    None where it has no such limit. `virtual`: at least so many, of an adapter still to come.
    """
    config: Any = getattr(model, "config", None)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) if config else None
    if not isinstance(limit, int) or limit < 1:  # DeBERTa says -1 where positions are relative
        return None
    there = max(getattr(module, "lorica_virtual_tokens", 0) for module in model.modules())
    return limit - first_position(model, limit) - max(there, virtual)


def first_position(model: nn.Module, limit: int) -> int:
    """The position of the first token of a text, in a model with a table of `limit` positions:
    RoBERTa and its like count from behind the filling token, whose embedding is one of the table.
    """
    offsets = (
        module.padding_idx + 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and name.endswith("position_embeddings")
        and module.padding_idx is not None
        and module.num_embeddings == limit
    )
    return next(offsets, 0)


def wide(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 where they are: what a loss is summed in."""
    return logits if logits.dtype == torch.float64 else logits.float()


def device_of(model: nn.Module) -> torch.device:
    """Where the inputs of `model` belong."""
    return next(model.parameters()).device


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first: a too large batch fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
