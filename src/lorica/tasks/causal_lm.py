"""Language models that continue a text: prompts with completions, chats, running text.

Training packs documents into one flat row where the model allows it, which a comparison of packed
with separate finds out once per model; otherwise the batch is padded. Only rows that carry a label
go through the output head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.base.batch import telling
from lorica.data.encode import IGNORED, CausalEncoder, Encoded, Example, Progress, TrainOn
from lorica.data.encoded_cache import Encoding, encoding_of
from lorica.data.template import ChatTemplate
from lorica.errors import ConfigError
from lorica.tasks.beginnings import Beginning
from lorica.tasks.documents import NAME
from lorica.tasks.flat import flat_batch, shifted
from lorica.tasks.head import gathered, head_losses
from lorica.tasks.last_layer import LastLayer, Place
from lorica.tasks.probe import (
    attention,
    beginnings_fault,
    packing_fault,
    place_of_rows,
    plain_head,
)
from lorica.tasks.task import (
    Batch,
    Prediction,
    answering,
    by_length,
    device_of,
    filler,
    mask_of,
    num_positions,
    pad,
    wide,
)


@dataclass
class CausalLM:
    """Settings and arithmetic of the task.

    Attributes:
        encoder: turns records into token ids and labels.
        packing: "auto", True (an error where the model cannot) or False.
        max_new_tokens: the longest generated answer.
        notes: what the user should be told.
    """

    encoder: CausalEncoder
    packing: bool | str = "auto"
    max_new_tokens: int = 128
    notes: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "causal-lm"

    def __post_init__(self) -> None:
        self._packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        self._heads: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
        self._ends: WeakKeyDictionary[nn.Module, LastLayer | None] = WeakKeyDictionary()
        self._joins: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        train_on: TrainOn = "completion",
        add_bos: bool | None = None,
        separator: str = "",
        template: ChatTemplate | None = None,
        packing: bool | str = "auto",
        max_new_tokens: int = 128,
    ) -> CausalLM:
        """The task with an encoder of these settings; see `CausalEncoder`."""
        encoder = CausalEncoder(
            tokenizer, template, max_length, train_on, add_bos, separator=separator
        )
        return cls(encoder, packing, max_new_tokens)

    @property
    def tokenizer(self) -> Any:
        return self.encoder.tokenizer

    # --- records to numbers -----------------------------------------------------------------------

    def encode(self, records: Sequence[dict], *, progress: Progress | None = None) -> Encoded:
        return self.encoder.encode(records, progress=progress)

    def encoding(self) -> Encoding:
        return encoding_of(__file__, self.encoder.settings, self.tokenizer, Example)

    def facts(self) -> dict[str, Any]:
        own = self.encoder
        return {
            "kind": self.kind,
            "max_length": own.max_length,
            "train_on": own.train_on,
            "add_bos": own.add_bos,
            "separator": own.separator,
            "eos_token": self.tokenizer.eos_token,
        }

    def shares(self, model: nn.Module) -> bool:
        return self.packs(model) and self._head(model) is not None

    def pads(self, model: nn.Module) -> bool:
        return not self.packs(model)

    def collate(
        self,
        blocks: Sequence[Sequence[Example]],
        model: nn.Module,
        *,
        alike: Sequence[Sequence[Beginning]] = (),
    ) -> Batch:
        """As every task does.

        Args:
            alike: for each block what of its examples' `beginnings` goes through the model once;
                only where `begins_once` says nothing against it.
        """
        if self.packs(model):
            keeps = self._end(model) is not None
            return flat_batch(blocks, device_of(model), keeps=keeps, alike=alike)
        (examples,) = blocks
        ids, device = [e.input_ids for e in examples], device_of(model)
        targets = pad([shifted(e.labels) for e in examples], IGNORED).flatten()
        keep = (targets != IGNORED).nonzero().flatten()
        inputs = {
            "input_ids": pad(ids, filler(model, self.tokenizer)),
            "attention_mask": mask_of(ids),
        }
        inputs = {k: t.to(device) for k, t in inputs.items()}
        prompts = tuple(example.num_prompt for example in examples)
        return Batch(inputs, (targets[keep].to(device),), (keep.to(device),), prompts=prompts)

    def rectangle(self, examples: Sequence[Example], model: nn.Module) -> dict[str, Any]:
        if not self.packs(model):
            return self.collate([examples], model).inputs
        fill = filler(model, self.tokenizer)  # no token sees what stands behind it: without a mask
        return {"input_ids": pad([e.input_ids for e in examples], fill).to(device_of(model))}

    # --- loss -------------------------------------------------------------------------------------

    def losses(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        return [losses.sum() for losses in self._row_losses(model, batch)]

    def _row_losses(self, model: Any, batch: Batch) -> list[Tensor]:
        """The loss of every row that carries a label, for each block (labels,)."""
        head, end, keep, kept = self._head(model), self._ends.get(model), batch.keep, None
        if end is not None and batch.kept is not None and not end.adapted(model, now=True):
            keep, kept = batch.kept.chosen, batch.kept
        labelled = list(zip(keep, batch.labels, strict=True))
        packed = self.running(model) if "documents" in batch.inputs else nullcontext()
        with packed, telling(model, batch.prompts):
            if end is not None:
                end.kept = kept
            if head is None:
                logits = model(**batch.inputs, use_cache=False).logits.flatten(0, 1)
                return [
                    F.cross_entropy(wide(logits[rows]), targets, reduction="none")
                    for rows, targets in labelled
                ]
            hidden = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
            flat = hidden.flatten(0, 1)
            with gathered(head):
                return [
                    head_losses(head, flat.index_select(0, rows), targets)
                    for rows, targets in labelled
                ]

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        if not self.packs(model):
            yield
            return
        end = self._ends.get(model)
        with attention(model, NAME), nullcontext() if end is None else end.running():
            yield

    def packs(self, model: nn.Module) -> bool:
        """Whether documents may share a row of this model; found out by running it, once.

        Raises:
            ConfigError: they may not, and `packing` is True.
        """
        if self.packing is False:
            return False
        if model not in self._packs:
            reason = packing_fault(model, longest=self.encoder.max_length)
            if reason is not None and self.packing is True:
                raise ConfigError(
                    f"packing is on, but this model cannot: {reason}", mend="set packing: auto"
                )
            if reason is not None:
                self.notes.append(f"batches are padded, not packed: {reason}")
            self._packs[model] = reason is None
        return self._packs[model]

    def begins_once(self, model: nn.Module) -> str | None:
        """Why documents that begin alike cannot go on behind one beginning in this model; None
        where they can, found out by running it, once.
        """
        if not self.packs(model):
            return "batches are padded"
        if model not in self._joins:
            self._joins[model] = beginnings_fault(model)
        return self._joins[model]

    def place(self, model: nn.Module) -> Place | None:
        """Where rows without a label leave `model`; None where all go through to the end."""
        end = self._end(model)
        return None if end is None else end.place

    def _end(self, model: nn.Module) -> LastLayer | None:
        """The last layer, where rows without a label need not go through all of it."""
        if model not in self._ends:
            place = place_of_rows(model) if self.packs(model) else None
            self._ends[model] = None if place is None else LastLayer(model, place)
        return self._ends[model]

    def assume(
        self,
        model: nn.Module,
        *,
        packs: bool,
        plain: bool,
        place: Place | None = None,
        joins: str | None = "it was not tried",
    ) -> None:
        """Take for granted what running `model` would tell: one without numbers cannot be asked.

        Args:
            packs: whether documents may share a row of it.
            plain: whether its logits are exactly head(hidden states).
            place: where rows without a label leave it.
            joins: what `begins_once` is to say.
        """
        self._packs[model], self._joins[model] = packs, joins
        self._ends[model] = None if place is None else LastLayer(model, place)
        self._heads[model] = model.get_output_embeddings() if plain else None  # type: ignore[operator]

    def _head(self, model: nn.Module) -> nn.Module | None:
        if model not in self._heads:
            self._heads[model] = plain_head(model)
        return self._heads[model]

    # --- predictions ------------------------------------------------------------------------------

    def predict(
        self,
        model: nn.Module,
        records: Sequence[dict],
        *,
        batch_size: int = 32,
        generate: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        examples = self.encode(records).examples
        outputs: list[Any] = [None] * len(records)
        cut = [0] * len(records)
        with answering(model):
            nll, counts = self._nll(model, examples, len(records), batch_size)
            if generate:
                asked = [self._prompt(record, model) for record in records]
                cut = [num_cut for _, num_cut in asked]
                outputs = self._generate(model, [ids for ids, _ in asked], batch_size, progress)
            elif progress is not None:
                progress(len(records))
        return [
            Prediction(record, loss, count, output, references(record), num_cut)
            for record, loss, count, output, num_cut in zip(
                records, nll, counts, outputs, cut, strict=True
            )
        ]

    def _nll(
        self, model: nn.Module, examples: Sequence[Example], num_records: int, batch_size: int
    ) -> tuple[list[float], list[int]]:
        """Loss and trained tokens of every record; a record may have several examples."""
        loss, counts = [0.0] * num_records, [0] * num_records
        for chosen in by_length([len(e) for e in examples], batch_size):
            block = [examples[i] for i in chosen]
            batch = self.collate([block], model)
            (losses,) = self.each_loss(model, batch, [block])
            for example, value in zip(block, losses, strict=True):
                loss[example.row] += value
                counts[example.row] += example.num_trained
        return loss, counts

    def each_loss(
        self, model: nn.Module, batch: Batch, blocks: Sequence[Sequence[Example]]
    ) -> list[list[float]]:
        found = []
        for each, block in zip(self._row_losses(model, batch), blocks, strict=True):
            parts = each.double().split([e.num_trained for e in block])
            found.append(torch.stack([part.sum() for part in parts]).tolist())
        return found

    def _prompt(self, record: dict, model: nn.Module) -> tuple[list[int], int]:
        """The ids to continue: never none, and leaving room for the answer among the model's
        positions; and how many were cut off for that.
        """
        limit = num_positions(model)
        most = None if limit is None else max(1, limit - self._room(limit))
        start = self.tokenizer.bos_token_id
        ids = self.encoder.prompt_ids(record)
        num_cut = 0 if most is None else max(0, len(ids) - most)
        if num_cut:
            ids = self.encoder.prompt_ids(record, most=most)
        return ids or [self.tokenizer.eos_token_id if start is None else start], num_cut

    def _room(self, limit: int | None) -> int:
        """Tokens that an answer may have: at most half of the model's positions."""
        return self.max_new_tokens if limit is None else min(self.max_new_tokens, limit // 2)

    def _generate(
        self,
        model: Any,
        prompts: Sequence[list[int]],
        batch_size: int,
        progress: Callable[[int], None] | None,
    ) -> list[str]:
        """Greedy answers, without special tokens and outer blanks."""
        outputs, done = [""] * len(prompts), 0
        stop = list(dict.fromkeys([*self.encoder.stop_ids, *stop_tokens(model, self.tokenizer)]))
        fill, device = filler(model, self.tokenizer), device_of(model)
        for chosen in by_length([len(p) for p in prompts], batch_size):
            ids = [prompts[i] for i in chosen]
            made = model.generate(
                input_ids=pad(ids, fill, left=True).to(device),
                attention_mask=mask_of(ids, left=True).to(device),
                max_new_tokens=self._room(num_positions(model)),
                do_sample=False,
                num_beams=1,
                pad_token_id=fill,
                eos_token_id=stop or None,
            )
            for i, row in zip(chosen, made[:, max(map(len, ids)) :].tolist(), strict=True):
                end = next((n for n, token in enumerate(row) if token in stop), len(row))
                outputs[i] = self.tokenizer.decode(row[:end], skip_special_tokens=True).strip()
            done += len(chosen)
            if progress is not None:
                progress(done)
        return outputs


def references(record: dict) -> tuple[str, ...]:
    """The acceptable outputs of a record: its references, else its completion, target or last
    answer.
    """
    if record.get("references"):
        return tuple(str(r).strip() for r in record["references"])
    for key in ("completion", "target"):
        if key in record:
            return (str(record[key]).strip(),)
    if messages := record.get("messages"):
        return (
            (str(messages[-1]["content"]).strip(),) if messages[-1]["role"] == "assistant" else ()
        )
    return ()


def stop_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's end of text and those of the generation
    settings.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(t for t in (tokenizer.eos_token_id, *more) if t is not None))
