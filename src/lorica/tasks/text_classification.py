"""One label for a text, or for a pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.data.encode import Encoded, Example
from lorica.errors import DataError, nearest
from lorica.tasks.task import Batch, Prediction, by_length, device_of, mask_of, pad


@dataclass
class TextClassification:
    """Settings and arithmetic of the task.

    Attributes:
        tokenizer: a tokenizer of transformers; its own special tokens frame the text.
        labels: names of the classes, in order of their index.
        max_length: longer texts are cut; None cuts nothing.
    """

    tokenizer: Any
    labels: tuple[str, ...]
    max_length: int | None = None
    notes: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "text-classification"

    def encode(self, records: Sequence[dict]) -> Encoded:
        examples, problems = [], []
        for row, record in enumerate(records):
            try:
                examples.append(self._example(record, row))
            except DataError as error:
                problems.append(f"record {row + 1}: {error.what}")
        if problems:
            raise DataError(
                f"{len(problems):,} of {len(records):,} records have no usable label",
                expected=f"one of: {', '.join(self.labels[:20])}",
                problems=problems[:5],
            )
        cut = sum(e.num_cut > 0 for e in examples)
        return Encoded(
            examples, [f"{cut:,} records cut to {self.max_length} tokens"] if cut else []
        )

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_length": self.max_length, "labels": list(self.labels)}

    def _example(self, record: dict, row: int) -> Example:
        texts = (
            (record["text"], record["text_pair"])
            if record.get("text_pair") is not None
            else (record["text"],)
        )
        ids = list(self.tokenizer(*texts, truncation=False, verbose=False)["input_ids"])
        cut = 0
        if self.max_length is not None and len(ids) > self.max_length:
            cut = len(ids) - self.max_length
            shorter = self.tokenizer(
                *texts, truncation=True, max_length=self.max_length, verbose=False
            )
            ids = list(shorter["input_ids"])
        return Example(ids, [self.index(record["label"])], row, cut)

    def index(self, label: str | int) -> int:
        """The index of a label given by name, or by number where the classes are numbered. Raises DataError."""
        if str(label) in self.labels:
            return self.labels.index(str(label))
        near = nearest(str(label), self.labels)
        raise DataError(
            f"the label {label!r} is none of the {len(self.labels)} classes",
            expected=f"one of: {', '.join(self.labels[:20])}",
            mend=f"did you mean {near!r}?" if near else None,
        )

    def shares(self, model: nn.Module) -> bool:
        return False

    def collate(self, blocks: Sequence[Sequence[Example]], model: nn.Module) -> Batch:
        (examples,) = blocks
        ids = [e.input_ids for e in examples]
        fill = self.tokenizer.pad_token_id or 0
        inputs = {"input_ids": pad(ids, fill), "attention_mask": mask_of(ids)}
        labels = torch.tensor([e.labels[0] for e in examples])
        device = device_of(model)
        inputs = {k: t.to(device) for k, t in inputs.items()}
        return Batch(inputs, (labels.to(device),), num_tokens=sum(map(len, ids)))

    def running(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext()

    def losses(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        return [F.cross_entropy(self._logits(model, batch), batch.labels[0], reduction="sum")]

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        config = model.config
        if config.pad_token_id is None:  # decoders find the last token by it
            config.pad_token_id = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id
        return model(**batch.inputs).logits.float()

    def predict(
        self,
        model: nn.Module,
        records: Sequence[dict],
        *,
        batch_size: int = 32,
        generate: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        was_training = model.training
        model.eval()
        found: dict[int, Prediction] = {}
        try:
            examples = self.encode(records).examples
            for chosen in by_length([len(e.input_ids) for e in examples], batch_size):
                batch = self.collate([[examples[i] for i in chosen]], model)
                with torch.no_grad():
                    logits = self._logits(model, batch)
                nll = F.cross_entropy(logits, batch.labels[0], reduction="none").tolist()
                for i, loss, label in zip(chosen, nll, logits.argmax(-1).tolist(), strict=True):
                    found[i] = Prediction(records[i], loss, 1, label, (examples[i].labels[0],))
                if progress is not None:
                    progress(len(found))
        finally:
            model.train(was_training)
        return [found[i] for i in range(len(records))]


def label_names(records: Sequence[dict]) -> tuple[str, ...]:
    """The classes that occur: numbers in their order, else names in alphabetical order. Raises DataError."""
    labels = {record["label"] for record in records}
    if any(isinstance(label, float) and not label.is_integer() for label in labels):
        raise DataError("the labels are fractions: this is a regression, not a classification")
    if len(labels) < 2:
        raise DataError(
            f"all {len(records)} records have the same label {next(iter(labels), None)!r}",
            expected="at least two classes",
        )
    try:
        return tuple(str(n) for n in sorted({int(label) for label in labels}))
    except ValueError:
        return tuple(sorted(str(label) for label in labels))
