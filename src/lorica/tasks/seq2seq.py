"""Encoder-decoder models: a source text to a target text (T5, BART)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn import functional as F

from lorica.data.encode import IGNORED, Encoded, Example, Progress
from lorica.data.encoded_cache import Encoding, encoding_of
from lorica.errors import BaseModelError, DataError
from lorica.tasks.causal_lm import references, stop_tokens
from lorica.tasks.head import head_losses
from lorica.tasks.probe import decoded, plain_decoder_head
from lorica.tasks.task import (
    Batch,
    Prediction,
    answering,
    by_length,
    device_of,
    filler,
    mask_of,
    pad,
    wide,
)


@dataclass(frozen=True, slots=True)
class SourceTarget(Example):
    """A source, and as its labels the target: the encoder runs on one, the decoder on the other."""

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids) + len(self.labels)


@dataclass
class Seq2Seq:
    """Settings and arithmetic of the task.

    Attributes:
        tokenizer: a tokenizer of transformers.
        max_length: longer sources and longer targets are cut, each; None cuts nothing.
        max_new_tokens: the longest generated answer.
        notes: what the user should be told.
    """

    tokenizer: Any
    max_length: int | None = None
    max_new_tokens: int = 128
    notes: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "seq2seq"

    def __post_init__(self) -> None:
        self._heads: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()

    # --- records to numbers -----------------------------------------------------------------------

    def encode(self, records: Sequence[dict], *, progress: Progress | None = None) -> Encoded:
        pairs, problems = [], []
        for row, record in enumerate(records):
            source = record.get("source", record.get("prompt"))
            target = record.get("target", record.get("completion"))
            if not isinstance(source, str) or not isinstance(target, str):
                problems.append(f"record {row + 1} has the columns {', '.join(map(str, record))}")
            elif not target.strip():
                problems.append(f"record {row + 1} has an empty target")
            pairs.append((source, target))
        if problems:
            raise DataError(
                f"{len(problems):,} of {len(records):,} records lack a source or a target text",
                problems=problems[:5],
                mend="map the columns: --columns source=...,target=...",
            )
        sources = self._ids(text=[source for source, _ in pairs])
        targets = self._ids(text_target=[target for _, target in pairs])
        examples: list[Example] = []
        for row, both in enumerate(zip(sources, targets, strict=True)):
            (ids, cut_source), (labels, cut_target) = both
            examples.append(SourceTarget(ids, labels, row, cut_source + cut_target, cut_target))
        cut = sum(e.num_cut > 0 for e in examples)
        note = f"{cut:,} records cut to {self.max_length} tokens"
        return Encoded(examples, [note] if cut else [])

    def encoding(self) -> Encoding:
        return encoding_of(__file__, self.facts(), self.tokenizer, SourceTarget)

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_length": self.max_length}

    def prompt_ids(self, record: Mapping[str, Any]) -> list[int]:
        """The ids that the model is asked with: exactly those of the source in `encode`."""
        ((ids, _),) = self._ids(text=[record.get("source", record.get("prompt"))])
        return ids

    def _ids(self, **texts: list[str]) -> list[tuple[list[int], int]]:
        """Token ids framed as the tokenizer frames them, each with one end token, and how many were
        cut off to make them `max_length`. What stands behind the text stays: the end token, and
        behind it the language where the tokenizer says that (mBART).
        """
        if not next(iter(texts.values())):
            return []
        rows = self.tokenizer(**texts, verbose=False)["input_ids"]
        frame = self.tokenizer(**{key: [""] for key in texts}, verbose=False)["input_ids"][0]
        end = self.tokenizer.eos_token_id
        tail = len(frame) - frame.index(end) if end in frame else 1
        missing = [] if end is None or end in frame else [end]
        found = []
        for row in rows:
            ids = [*row, *(missing if row[-1:] != missing else [])]
            most = len(ids) if self.max_length is None else min(len(ids), self.max_length)
            kept = [*ids[: max(0, most - tail)], *ids[-min(most, tail) :]] if ids else ids
            found.append((kept, len(ids) - len(kept)))
        return found

    def shares(self, model: nn.Module) -> bool:
        return False

    def pads(self, model: nn.Module) -> bool:
        return True

    def collate(self, blocks: Sequence[Sequence[Example]], model: Any) -> Batch:
        (examples,) = blocks
        ids, device = [e.input_ids for e in examples], device_of(model)
        labels = pad([e.labels for e in examples], IGNORED).to(device)
        inputs = {
            "input_ids": pad(ids, filler(model, self.tokenizer)).to(device),
            "attention_mask": mask_of(ids).to(device),
            "decoder_input_ids": _one_later(model, labels),
        }
        return Batch(inputs, (labels,))

    def rectangle(self, examples: Sequence[Example], model: nn.Module) -> dict[str, Any]:
        return self.collate([examples], model).inputs

    # --- loss and predictions ---------------------------------------------------------------------

    def running(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext()

    def losses(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        return [self._each(model, batch).sum()]

    def each_loss(
        self, model: nn.Module, batch: Batch, blocks: Sequence[Sequence[Any]]
    ) -> list[list[float]]:
        return [self._each(model, batch).double().sum(1).tolist()]

    def _each(self, model: nn.Module, batch: Batch) -> Tensor:
        """Negative log-likelihood of every label, (records, longest target); 0 where padded."""
        (labels,) = batch.labels
        if (head := self._head(model)) is None:
            logits = wide(model(**batch.inputs, use_cache=False).logits)
            return F.cross_entropy(
                logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
            )
        rows = (labels != IGNORED).flatten().nonzero().flatten()
        hidden = decoded(model, batch.inputs).flatten(0, 1).index_select(0, rows)
        found = head_losses(head, hidden, labels.flatten()[rows])
        return found.new_zeros(labels.numel()).index_copy(0, rows, found).view(labels.shape)

    def assume(self, model: Any, *, plain: bool) -> None:
        """Take for granted whether the logits of `model` are exactly those of its head."""
        self._heads[model] = model.get_output_embeddings() if plain else None

    def _head(self, model: nn.Module) -> nn.Module | None:
        if model not in self._heads:
            self._heads[model] = plain_decoder_head(model)
        return self._heads[model]

    def predict(
        self,
        model: nn.Module,
        records: Sequence[dict],
        *,
        batch_size: int = 32,
        generate: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        found: dict[int, Prediction] = {}
        examples = self.encode(records).examples
        with answering(model):
            for chosen in by_length([len(e) for e in examples], batch_size):
                block = [examples[i] for i in chosen]
                batch = self.collate([block], model)
                nll = self._each(model, batch).double().sum(1).tolist()
                outputs = self._generate(model, batch) if generate else [None] * len(block)
                for i, loss, output in zip(chosen, nll, outputs, strict=True):
                    trained = examples[i].num_trained
                    found[i] = Prediction(records[i], loss, trained, output, references(records[i]))
                if progress is not None:
                    progress(len(found))
        return [found[i] for i in range(len(records))]

    def _generate(self, model: Any, batch: Batch) -> list[str]:
        """Greedy answers, without special tokens and outer blanks."""
        made = model.generate(
            input_ids=batch.inputs["input_ids"],
            attention_mask=batch.inputs["attention_mask"],
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=filler(model, self.tokenizer),
            eos_token_id=stop_tokens(model, self.tokenizer) or None,
        )
        texts = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [text.strip() for text in texts]


def _one_later(model: Any, labels: Tensor) -> Tensor:
    """What the decoder is given to predict `labels`: them, one place later, as the model has it.

    Raises:
        BaseModelError: the model does not say what a target begins with.
    """
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    config = model.config
    start, fill = getattr(config, "decoder_start_token_id", None), config.pad_token_id
    if start is None or fill is None:
        raise BaseModelError(
            f"{type(model).__name__} does not say which token a target begins with",
            expected="an encoder-decoder whose config has decoder_start_token_id and pad_token_id",
            mend="choose such a base, or another task",
        )
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == IGNORED, fill)
