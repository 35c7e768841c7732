"""One label for a text, or for a pair of texts.

Training packs texts into one flat row where the model allows it, as documents of language models
are (`documents`), and behind the last layer only the token that the head reads goes on
(`last_layer`). Whether classes are the same so is found out once per model by running it; where
they are not, texts of similar length are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.data.encode import Encoded, Example, Progress
from lorica.data.encoded_cache import Encoding, encoding_of
from lorica.errors import ConfigError, DataError, nearest
from lorica.tasks.documents import NAME
from lorica.tasks.last_layer import LastLayer, Place
from lorica.tasks.probe import attention, packing_texts
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
from lorica.tasks.texts import takes_segments, text_inputs

TOKENIZED_AT_ONCE = 2000
"""Records, after which it is told how many are done."""


@dataclass(frozen=True, slots=True)
class LabelledText(Example):
    """An encoded text; its one label is the index of the class.

    Attributes:
        segments: 0 for tokens of the first text and 1 for those of the second; empty where the
            tokenizer does not tell the two apart, or where there is one text only.
    """

    segments: tuple[int, ...] = ()


@dataclass
class TextClassification:
    """Settings and arithmetic of the task.

    Attributes:
        tokenizer: a tokenizer of transformers; its own special tokens frame the text.
        labels: names of the classes, in order of their index.
        max_length: longer texts are cut; None cuts nothing.
        packing: "auto", True (an error where the model cannot) or False.
        notes: what the user should be told.
    """

    tokenizer: Any
    labels: tuple[str, ...]
    max_length: int | None = None
    packing: bool | str = "auto"
    notes: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "text-classification"

    def __post_init__(self) -> None:
        self._ends: WeakKeyDictionary[nn.Module, LastLayer | None] = WeakKeyDictionary()

    # --- records to numbers -----------------------------------------------------------------------

    def encode(self, records: Sequence[dict], *, progress: Progress | None = None) -> Encoded:
        labels: list[int] = []
        problems = []
        for row, record in enumerate(records):
            if fault := _text_fault(record):
                problems.append(f"record {row + 1}: {fault}")
                continue
            try:
                labels.append(self.index(record["label"]))
            except DataError as error:
                problems.append(f"record {row + 1}: {error.what}")
        if problems:
            raise DataError(
                f"{len(problems):,} of {len(records):,} records have no usable text or label",
                expected=f"a text, and as its label one of: {', '.join(self.labels[:20])}",
                problems=problems[:5],
            )
        examples = [
            LabelledText(ids, [label], row, num_cut, segments=segments)
            for row, ((ids, segments, num_cut), label) in enumerate(
                zip(self._tokens(records, progress), labels, strict=True)
            )
        ]
        cut = sum(e.num_cut > 0 for e in examples)
        note = f"{cut:,} records cut to {self.max_length} tokens"
        return Encoded(list(examples), [note] if cut else [])

    def encoding(self) -> Encoding:
        return encoding_of(__file__, self.facts(), self.tokenizer, LabelledText)

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_length": self.max_length, "labels": list(self.labels)}

    def _tokens(
        self, records: Sequence[dict], progress: Progress | None
    ) -> list[tuple[list[int], tuple[int, ...], int]]:
        """Token ids, segments and the number of tokens cut off, for every record."""
        found: list[Any] = [None] * len(records)
        paired = [record.get("text_pair") is not None for record in records]
        for kind in (False, True):
            chosen = [i for i, pair in enumerate(paired) if pair is kind]
            whole = []
            for start in range(0, len(chosen), TOKENIZED_AT_ONCE):
                part = [records[i] for i in chosen[start : start + TOKENIZED_AT_ONCE]]
                whole += self._tokenized(part, kind, cut=False)
                if progress is not None:
                    progress(len(whole) + (len(records) - len(chosen) if kind else 0))
            found_here = dict(zip(chosen, whole, strict=True))
            limit = self.max_length or max((len(ids) for ids, _ in whole), default=0)
            long = [i for i in chosen if len(found_here[i][0]) > limit]
            shorter = self._tokenized([records[i] for i in long], kind, cut=True)
            for i, (ids, segments) in found_here.items():
                found[i] = ids, segments, 0
            for i, (ids, segments) in zip(long, shorter, strict=True):
                found[i] = ids, segments, len(found[i][0]) - len(ids)
        return found

    def _tokenized(
        self, records: Sequence[dict], paired: bool, *, cut: bool
    ) -> list[tuple[list[int], tuple[int, ...]]]:
        if not records:
            return []
        second = [[record["text_pair"] for record in records]] if paired else []
        how = {"truncation": True, "max_length": self.max_length} if cut else {"truncation": False}
        how |= {"return_token_type_ids": paired, "verbose": False}
        made = self.tokenizer([record["text"] for record in records], *second, **how)
        rows = made["input_ids"]
        segments = made.get("token_type_ids") if paired else None
        return [(list(ids), tuple(segments[i]) if segments else ()) for i, ids in enumerate(rows)]

    def index(self, label: str | int | float | bool) -> int:
        """The index of a label given by name, in any case where that leaves no doubt, or by number
        where the classes are numbered. Raises DataError.
        """
        name = _name(label)
        if name in self.labels:
            return self.labels.index(name)
        if f"LABEL_{name}" in self.labels:  # what transformers calls classes without names
            return self.labels.index(f"LABEL_{name}")
        alike = [i for i, own in enumerate(self.labels) if own.casefold() == name.casefold()]
        if len(alike) == 1:
            return alike[0]
        near = nearest(name, self.labels)
        raise DataError(
            f"the label {label!r} is none of the {len(self.labels)} classes",
            expected=f"one of: {', '.join(self.labels[:20])}",
            mend=f"did you mean {near!r}?" if near else None,
        )

    def shares(self, model: nn.Module) -> bool:
        return self._end(model) is not None

    def pads(self, model: nn.Module) -> bool:
        return self._end(model) is None

    def place(self, model: nn.Module) -> Place | None:
        """Where rows that the head does not read leave `model`; None where it is given texts beside
        each other.
        """
        end = self._end(model)
        return None if end is None else end.place

    def assume(self, model: nn.Module, place: Place | None) -> None:
        """Take for granted what `place` would find by running `model`."""
        self._ends[model] = None if place is None else LastLayer(model, place)

    def _end(self, model: nn.Module) -> LastLayer | None:
        """The last layer of a model that takes packed texts; found out by running it, once.

        Raises:
            ConfigError: it does not, and `packing` is True.
        """
        if self.packing is False:
            return None
        if model not in self._ends:
            reason, place = packing_texts(model)
            if reason is not None and self.packing is True:
                raise ConfigError(
                    f"packing is on, but this model cannot: {reason}", mend="set packing: auto"
                )
            if reason is not None:
                self.notes.append(f"batches are of similar lengths, padded, not packed: {reason}")
            self._ends[model] = None if place is None else LastLayer(model, place)
        end = self._ends[model]
        return None if end is None or end.adapted(model, now=False) else end

    def collate(self, blocks: Sequence[Sequence[Example]], model: nn.Module) -> Batch:
        labels = tuple(torch.tensor([e.labels[0] for e in block]) for block in blocks)
        labels = tuple(own.to(device_of(model)) for own in labels)
        if self._end(model) is None:
            (examples,) = blocks
            return Batch(self.rectangle(examples, model), labels)
        ids = [[e.input_ids for e in block] for block in blocks]
        inputs, rows, kept = text_inputs(ids, [_segments(block, model) for block in blocks], model)
        return Batch(inputs, labels, rows=rows, kept=kept)

    def rectangle(self, examples: Sequence[Example], model: nn.Module) -> dict[str, Tensor]:
        ids, segments = [e.input_ids for e in examples], _segments(examples, model)
        inputs = {
            "input_ids": pad(ids, filler(model, self.tokenizer)),
            "attention_mask": mask_of(ids),
        }
        if any(segments):
            full = [s or (0,) * len(own) for s, own in zip(segments, ids, strict=True)]
            inputs["token_type_ids"] = pad(full, 0)
        device = device_of(model)
        return {k: t.to(device) for k, t in inputs.items()}

    # --- loss and predictions ---------------------------------------------------------------------

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        end = self._end(model)
        if end is None:
            yield
            return
        with attention(model, NAME), end.running():
            yield

    def losses(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        return [
            F.cross_entropy(logits, labels, reduction="sum")
            for logits, labels in zip(self._logits(model, batch), batch.labels, strict=True)
        ]

    def each_loss(
        self, model: nn.Module, batch: Batch, blocks: Sequence[Sequence[Any]]
    ) -> list[list[float]]:
        return [
            F.cross_entropy(logits, labels, reduction="none").tolist()
            for logits, labels in zip(self._logits(model, batch), batch.labels, strict=True)
        ]

    def _logits(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """For each block the logits of its records (records, classes)."""
        if batch.kept is None:
            with _filled_with(model, filler(model, self.tokenizer)):
                return [wide(model(**batch.inputs).logits)]
        with self.running(model):
            end = self._ends[model]
            assert end is not None
            end.kept = batch.kept
            logits = wide(model(**batch.inputs).logits)
            return [logits.index_select(0, rows) for rows in batch.kept.chosen]

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
                batch = self.collate([[examples[i] for i in chosen]], model)
                (logits,) = self._logits(model, batch)
                nll = F.cross_entropy(logits, batch.labels[0], reduction="none").tolist()
                for i, loss, label in zip(chosen, nll, logits.argmax(-1).tolist(), strict=True):
                    found[i] = Prediction(records[i], loss, 1, label, (examples[i].labels[0],))
                if progress is not None:
                    progress(len(found))
        return [found[i] for i in range(len(records))]


def label_names(records: Sequence[dict]) -> tuple[str, ...]:
    """The classes that occur: numbers in their order, else names in alphabetical order. Raises
    DataError.
    """
    labels = [record["label"] for record in records]
    if any(isinstance(label, float) and not label.is_integer() for label in labels):
        raise DataError("the labels are fractions: this is a regression, not a classification")
    names = {_name(label) for label in labels}
    if len(names) < 2:
        raise DataError(
            f"all {len(records)} records have the same label {next(iter(names), None)!r}",
            expected="at least two classes",
        )
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def _name(label: str | int | float | bool) -> str:
    """A label as the name of its class: 1, 1.0 and "1" are one class."""
    whole = isinstance(label, float) and label.is_integer()
    return str(int(label)) if whole else str(label).strip()


def _text_fault(record: dict) -> str | None:
    """What a record lacks to be classified."""
    for key in ("text", "label"):
        if record.get(key) is None:
            return f"it has no {key}, but the columns {', '.join(map(str, record))}"
    texts = record["text"], record.get("text_pair") or ""
    return None if all(isinstance(t, str) for t in texts) else "its text is no text"


def _segments(examples: Sequence[Example], model: nn.Module) -> list[tuple[int, ...]]:
    """Segments of every text, where the model tells them apart."""
    if not takes_segments(model):
        return [() for _ in examples]
    return [getattr(e, "segments", ()) for e in examples]


@contextmanager
def _filled_with(model: Any, fill: int) -> Iterator[None]:
    """Tell a decoder without a filling token which one is used here: it reads the class off the
    last other token.
    """
    config = model.config.get_text_config()
    before = config.pad_token_id
    if before is None:
        config.pad_token_id = fill
    try:
        yield
    finally:
        config.pad_token_id = before
