"""What records are once they are encoded: token ids and labels, as plain lists."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from lorica.data.problems import counted

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded record, or one window of a long text.

    Attributes:
        input_ids: token ids.
        labels: the same ids where the loss falls, -100 elsewhere; not shifted; labels[0] is -100.
        row: index of the record.
        num_cut: tokens cut off to fit.
        num_trained_cut: trained tokens among them.
    """

    input_ids: list[int]
    labels: list[int]
    row: int = 0
    num_cut: int = 0
    num_trained_cut: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that the model is run on."""
        return len(self.input_ids)

    @property
    def num_trained(self) -> int:
        """Tokens on which the loss falls."""
        return len(self.labels) - self.labels.count(IGNORED)

    def drawn(self, seed: int, epoch: int) -> Self:
        """The example as it is in one epoch, where anything of it is drawn anew in each."""
        return self

    @property
    def num_prompt(self) -> int:
        """Tokens before the first on which the loss falls; all where it falls on none."""
        trained = (i for i, label in enumerate(self.labels) if label != IGNORED)
        return next(trained, len(self))


@dataclass(frozen=True)
class Encoded(Sequence[Example]):
    """Encoded records.

    Attributes:
        examples: in the order of the records; a text longer than max_length gives several.
        notes: what the user should know, in words.
        origins: (file, line) of each record, where known; `Example.row` points into it.
    """

    examples: list[Example]
    notes: list[str]
    origins: Sequence[tuple[str, int]] = ()

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def num_tokens(self) -> int:
        return sum(example.num_tokens for example in self.examples)

    @cached_property
    def num_trained_tokens(self) -> int:
        return sum(example.num_trained for example in self.examples)

    @cached_property
    def num_truncated(self) -> int:
        """Examples that were cut."""
        return sum(example.num_cut > 0 for example in self.examples)

    def statement(self) -> str:
        """Tokens, the share that is trained, and what was cut, in one line."""
        share = self.num_trained_tokens / max(1, self.num_tokens)
        text = f"{counted(len(self), 'example')}, {self.num_tokens:,} tokens, {share:.1%} trained"
        return "; ".join([text, *self.notes])
