"""Language models that continue a text: prompts with completions, chats, running text.

Training packs documents into one flat row where the model allows it, which a comparison of packed with separate
finds out once per model; otherwise the batch is padded. Only rows that carry a label go through the output head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.data.encode import CausalEncoder, Encoded, Example, TrainOn
from lorica.data.template import ChatTemplate
from lorica.errors import ConfigError
from lorica.tasks.documents import NAME, NotSupported, lay_out
from lorica.tasks.task import Batch, Prediction, by_length, device_of, mask_of, pad

IGNORED = -100
"""The label of a token that is not trained."""


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

    # --- records to numbers ---------------------------------------------------------------------------------

    def encode(self, records: Sequence[dict]) -> Encoded:
        return self.encoder.encode(records)

    def facts(self) -> dict[str, Any]:
        own = self.encoder
        return {
            "kind": self.kind,
            "max_length": own.max_length,
            "train_on": own.train_on,
            "add_bos": own.add_bos,
            "separator": own.separator,
        }

    def shares(self, model: nn.Module) -> bool:
        return self.packs(model) and self._head(model) is not None

    def collate(self, blocks: Sequence[Sequence[Example]], model: nn.Module) -> Batch:
        device, num_tokens = device_of(model), sum(len(e.input_ids) for b in blocks for e in b)
        if not self.packs(model):
            (examples,) = blocks
            ids = [e.input_ids for e in examples]
            targets = pad([_shifted(e.labels) for e in examples], IGNORED).flatten()
            inputs = {"input_ids": pad(ids, 0), "attention_mask": mask_of(ids)}
            keep = (targets != IGNORED).nonzero().flatten()
            inputs = {k: t.to(device) for k, t in inputs.items()}
            return Batch(inputs, (targets[keep].to(device),), (keep.to(device),), None, num_tokens)
        documents, rows, positions = lay_out([[len(e.input_ids) for e in b] for b in blocks])
        ids = torch.zeros(len(positions), dtype=torch.long)
        targets = torch.full((len(positions),), IGNORED)
        for (start, _), block in zip(rows, blocks, strict=True):
            flat = [i for e in block for i in e.input_ids]
            ids[start : start + len(flat)] = torch.tensor(flat)
            targets[start : start + len(flat)] = torch.tensor(
                [t for e in block for t in _shifted(e.labels)]
            )
        keep = tuple(
            start + (targets[start:end] != IGNORED).nonzero().flatten() for start, end in rows
        )
        inputs = {
            "input_ids": ids[None].to(device),
            "position_ids": positions[None].to(device),
            "documents": documents.to(device),
        }
        labels = tuple(targets[k].to(device) for k in keep)
        return Batch(inputs, labels, tuple(k.to(device) for k in keep), tuple(rows), num_tokens)

    # --- loss -----------------------------------------------------------------------------------------------

    def losses(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        packed = "documents" in batch.inputs
        head = self._head(model)
        with _attention(model, NAME) if packed else contextlib.nullcontext():
            if head is None:
                logits = model(**batch.inputs, use_cache=False).logits.flatten(0, 1)
                kept = [logits[k] for k in batch.keep]
            else:
                hidden = model.base_model(
                    **batch.inputs, use_cache=False
                ).last_hidden_state.flatten(0, 1)
                kept = [head(hidden[k]) for k in batch.keep]
        return [
            F.cross_entropy(z.float(), t, reduction="sum")
            for z, t in zip(kept, batch.labels, strict=True)
        ]

    def running(self, model: nn.Module) -> contextlib.AbstractContextManager:
        return _attention(model, NAME) if self.packs(model) else contextlib.nullcontext()

    def packs(self, model: nn.Module) -> bool:
        """Whether documents may share a row of this model; found out by running it, once."""
        if self.packing is False:
            return False
        if model not in self._packs:
            reason = _packing_fault(model)
            self._packs[model] = reason is None
            if reason is not None and self.packing is True:
                raise ConfigError(
                    f"packing is on, but this model cannot: {reason}", mend="set packing: auto"
                )
            if reason is not None:
                self.notes.append(f"batches are padded, not packed: {reason}")
        return self._packs[model]

    def _head(self, model: nn.Module) -> nn.Module | None:
        """The output head, where logits are exactly head(hidden states); None where the model does more."""
        if model not in self._heads:
            self._heads[model] = _plain_head(model)
        return self._heads[model]

    # --- predictions ----------------------------------------------------------------------------------------

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
        try:
            examples = self.encode(records).examples
            nll, counts = self._nll(model, examples, len(records), batch_size)
            outputs: list[Any] = [None] * len(records)
            if generate:
                prompts = [self.encoder.prompt_ids(record) for record in records]
                outputs = self._generate(model, prompts, batch_size, progress)
        finally:
            model.train(was_training)
        return [
            Prediction(record, loss, count, output, references(record))
            for record, loss, count, output in zip(records, nll, counts, outputs, strict=True)
        ]

    @torch.no_grad()
    def _nll(
        self, model: nn.Module, examples: Sequence[Example], num_records: int, batch_size: int
    ) -> tuple[list[float], list[int]]:
        """Loss and trained tokens of every record; a record may have several examples."""
        loss, counts = [0.0] * num_records, [0] * num_records
        for chosen in by_length([len(e) for e in examples], batch_size):
            block = [examples[i] for i in chosen]
            batch = self.collate([block], model)
            for example, value in zip(block, self._each_loss(model, batch, block), strict=True):
                loss[example.row] += value
                counts[example.row] += example.num_trained
        return loss, counts

    def _each_loss(
        self, model: nn.Module, batch: Batch, examples: Sequence[Example]
    ) -> list[float]:
        """The loss of every example of a one-block batch by itself."""
        head = self._head(model)
        with _attention(model, NAME) if "documents" in batch.inputs else contextlib.nullcontext():
            if head is None:
                kept = model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.keep[0]]
            else:
                hidden = model.base_model(
                    **batch.inputs, use_cache=False
                ).last_hidden_state.flatten(0, 1)
                kept = head(hidden[batch.keep[0]])
        each = F.cross_entropy(kept.float(), batch.labels[0], reduction="none").double()
        return [part.sum().item() for part in each.split([e.num_trained for e in examples])]

    @torch.no_grad()
    def _generate(
        self,
        model: nn.Module,
        prompts: Sequence[list[int]],
        batch_size: int,
        progress: Callable[[int], None] | None,
    ) -> list[str]:
        """Greedy answers, without special tokens and outer blanks."""
        outputs, done = [""] * len(prompts), 0
        stop = list(dict.fromkeys([*self.encoder.stop_ids, *stop_tokens(model, self.tokenizer)]))
        fill = (
            self.tokenizer.pad_token_id
            if self.tokenizer.pad_token_id is not None
            else (stop[0] if stop else 0)
        )
        for chosen in by_length([len(p) for p in prompts], batch_size):
            ids = [prompts[i] for i in chosen]
            width = max(len(p) for p in ids)
            made = model.generate(
                input_ids=pad(ids, fill, left=True).to(device_of(model)),
                attention_mask=mask_of(ids, left=True).to(device_of(model)),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=fill,
                eos_token_id=stop or None,
            )
            for i, row in zip(chosen, made[:, width:].tolist(), strict=True):
                end = next((n for n, token in enumerate(row) if token in stop), len(row))
                outputs[i] = self.tokenizer.decode(row[:end], skip_special_tokens=True).strip()
            done += len(chosen)
            if progress is not None:
                progress(done)
        return outputs


def references(record: dict) -> tuple[str, ...]:
    """The acceptable outputs of a record: its references, else its completion, target or last answer."""
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
    """Every token that ends an answer: the tokenizer's end of text and those of the generation settings."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(t for t in (tokenizer.eos_token_id, *more) if t is not None))


def _shifted(labels: Sequence[int]) -> list[int]:
    """The label of the next token at every position; the last position has none."""
    return [*labels[1:], IGNORED]


@contextlib.contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    """Run the block with another attention function, and put the model's own back."""
    before = model.config._attn_implementation
    if before != name:
        model.set_attn_implementation(name)
    try:
        yield
    finally:
        if before != name:
            model.set_attn_implementation(before)


@torch.no_grad()
def _packing_fault(model: Any) -> str | None:
    """Why documents cannot share a row; None when packed equals separate on three short documents."""
    if not hasattr(model, "set_attn_implementation") or not hasattr(model, "config"):
        return "it is no model of transformers"
    own = model.config._attn_implementation
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary, device = model.config.get_text_config().vocab_size, device_of(model)
    texts = [torch.randint(1, min(vocabulary, 1000), (n,), generator=generator) for n in (7, 5, 9)]
    try:
        alone = [model(t[None].to(device), use_cache=False).logits[0] for t in texts]
        with _attention(model, NAME):
            if model.config._attn_implementation != NAME:
                return "it does not take another attention function"
            documents, _, positions = lay_out([[len(t) for t in texts]])
            ids = torch.zeros(len(positions), dtype=torch.long)
            ids[:21] = torch.cat(texts)
            inputs = {"position_ids": positions[None].to(device), "documents": documents.to(device)}
            packed = model(ids[None].to(device), **inputs, use_cache=False).logits[0, :21]
    except (NotSupported, TypeError, ValueError, RuntimeError, IndexError) as error:
        return str(error).splitlines()[0][:120]
    finally:
        if model.config._attn_implementation != own:
            model.set_attn_implementation(own)
        model.train(was_training)
    alone = torch.cat(alone).float()
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2
    worst = (packed.float() - alone).abs().max().item()
    if not worst <= tolerance * max(1.0, alone.abs().max().item()):
        return f"packed documents see each other (logits differ by {worst:.2g})"
    return None


@torch.no_grad()
def _plain_head(model: Any) -> nn.Module | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    backbone = getattr(model, "base_model", None)
    if head is None or backbone is None or backbone is model:
        return None
    was_training = model.training
    model.eval()
    ids = torch.arange(1, 8, device=device_of(model))[None]
    try:
        wanted = model(ids, use_cache=False).logits
        same = torch.equal(head(backbone(ids, use_cache=False).last_hidden_state), wanted)
    except (TypeError, AttributeError, RuntimeError):
        return None
    finally:
        model.train(was_training)
    return head if same else None
