"""Encoder-decoder models: a source text to a target text (T5, BART)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.data.encode import Encoded, Example
from lorica.errors import DataError
from lorica.tasks.causal_lm import IGNORED, references, stop_tokens
from lorica.tasks.task import Batch, Prediction, by_length, device_of, mask_of, pad


@dataclass
class Seq2Seq:
    """Settings and arithmetic of the task.

    Attributes:
        tokenizer: a tokenizer of transformers.
        max_length: longer sources and longer targets are cut, each; None cuts nothing.
        max_new_tokens: the longest generated answer.
    """

    tokenizer: Any
    max_length: int | None = None
    max_new_tokens: int = 128
    notes: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "seq2seq"

    def encode(self, records: Sequence[dict]) -> Encoded:
        examples, problems = [], []
        for row, record in enumerate(records):
            source, target = (
                record.get("source", record.get("prompt")),
                record.get("target", record.get("completion")),
            )
            if not isinstance(source, str) or not isinstance(target, str) or not target.strip():
                problems.append(
                    f"record {row + 1} has the columns {', '.join(record)}, or an empty target"
                )
                continue
            ids, cut_source = self._cut(self._ids(source))
            labels, cut_target = self._cut(self._ids(target, as_target=True))
            examples.append(Example(ids, labels, row, cut_source + cut_target, cut_target))
        if problems:
            raise DataError(
                f"{len(problems):,} of {len(records):,} records lack a source or a target text",
                problems=problems[:5],
                mend="map the columns: --columns source=...,target=...",
            )
        cut = sum(e.num_cut > 0 for e in examples)
        return Encoded(
            examples, [f"{cut:,} records cut to {self.max_length} tokens"] if cut else []
        )

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_length": self.max_length}

    def _ids(self, text: str, *, as_target: bool = False) -> list[int]:
        """Token ids framed as the tokenizer frames them, with exactly one end token."""
        given = {"text_target": text} if as_target else {"text": text}
        ids = list(self.tokenizer(**given, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _cut(self, ids: list[int]) -> tuple[list[int], int]:
        """At most `max_length` ids; the end token stays."""
        if self.max_length is None or len(ids) <= self.max_length:
            return ids, 0
        return [*ids[: self.max_length - 1], ids[-1]], len(ids) - self.max_length

    def shares(self, model: nn.Module) -> bool:
        return False

    def collate(self, blocks: Sequence[Sequence[Example]], model: nn.Module) -> Batch:
        (examples,) = blocks
        ids = [e.input_ids for e in examples]
        device, fill = device_of(model), self.tokenizer.pad_token_id or 0
        labels = pad([e.labels for e in examples], IGNORED).to(device)
        inputs = {
            "input_ids": pad(ids, fill).to(device),
            "attention_mask": mask_of(ids).to(device),
            "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels),
        }
        return Batch(
            inputs, (labels,), num_tokens=sum(len(e.input_ids) + len(e.labels) for e in examples)
        )

    def running(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext()

    def losses(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        return [self._each(model, batch).sum()]

    def _each(self, model: nn.Module, batch: Batch) -> Tensor:
        """Negative log-likelihood of every label, (records, longest target); 0 where padded."""
        logits = model(**batch.inputs, use_cache=False).logits.float()
        return F.cross_entropy(
            logits.transpose(1, 2), batch.labels[0], reduction="none", ignore_index=IGNORED
        )

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
                block = [examples[i] for i in chosen]
                batch = self.collate([block], model)
                with torch.no_grad():
                    nll = self._each(model, batch).double().sum(1).tolist()
                outputs = self._generate(model, batch) if generate else [None] * len(block)
                for i, loss, output in zip(chosen, nll, outputs, strict=True):
                    found[i] = Prediction(
                        records[i], loss, len(examples[i].labels), output, references(records[i])
                    )
                if progress is not None:
                    progress(len(found))
        finally:
            model.train(was_training)
        return [found[i] for i in range(len(records))]

    @torch.no_grad()
    def _generate(self, model: nn.Module, batch: Batch) -> list[str]:
        stop = stop_tokens(model, self.tokenizer)
        made = model.generate(
            input_ids=batch.inputs["input_ids"],
            attention_mask=batch.inputs["attention_mask"],
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=stop or None,
        )
        return [
            text.strip() for text in self.tokenizer.batch_decode(made, skip_special_tokens=True)
        ]
