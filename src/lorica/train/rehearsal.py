"""A run on a shadow: what steps, scoring and answers of a model with an adapter would allocate.

The tensors are fake (see `shadow`), the order of things is that of a run, and a ledger (see
`ledger`) writes down every storage that comes and goes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.activate import Activation
from lorica.attach.handle import Adapter
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.errors import ConfigError
from lorica.tasks.task import Batch, answering, by_length
from lorica.train.engine import Engine, at_rest, between_of, resting
from lorica.train.ledger import Event, Ledger, most_alive, renumbered, resident
from lorica.train.optim import moment_sizes
from lorica.train.passes import route_of
from lorica.train.shadow import Shadow


@dataclass(frozen=True)
class Scoring:
    """What base and tuned are scored on. `new_tokens` 0: nothing is generated."""

    examples: Sequence[Example] = ()
    batch_size: int = 32
    new_tokens: int = 0


@dataclass(frozen=True)
class Trained:
    """What steps of training take beyond what is there all the time: at most `resident` bytes,
    `parts` of it by kind; `tokens` of the largest batch.
    """

    resident: int
    parts: dict[str, int]
    tokens: int


class Rehearsal:
    """Runs a shadow with an adapter, and writes down what it would allocate."""

    def __init__(self, shadow: Shadow, engine: Engine, adapter: Adapter, total: int) -> None:
        self.shadow, self.engine, self.adapter = shadow, engine, adapter
        self.task: Any = engine.task
        self.between = between_of(adapter, total, seed=0)
        if problems := self.between.problems():
            raise ConfigError("the method cannot run so", problems=problems)
        self.resting = at_rest(adapter, self.between, 0)
        self.route = route_of(adapter, dropout_seed=0)
        if self.route.weights is not None:
            _ = self.route.table  # no numbers can be read where tensors are fake
        self.model: Any = shadow.model
        self.vocabulary = self.model.config.get_text_config().vocab_size

    def training(self, largest: Sequence[Example], settings: TrainSettings) -> Trained:
        """Three steps over the largest batch, as the allocator would see them. The optimizer's
        tensors come after the first.
        """
        self.model.train()
        ledger = self._ledger()
        if settings.gradient_accumulation_steps > 1:  # gradients are there when the next part comes
            with self.shadow.mode, ledger:
                for parameter in self._training():
                    parameter.grad = torch.empty_like(parameter)
        forward = self._step(ledger, largest)
        gradients = {ledger.number_of(p.grad) for p in self._parameters() if p.grad is not None}
        peak_at = ledger.peak_at
        self._drop_gradients()
        parts = self._parts(ledger, peak_at, forward, gradients)
        self.model.eval()
        sizes = [size for p in self._training() for size in moment_sizes(p, settings)]
        sizes += [kept] if (kept := self.between.kept_bytes()) else []
        moments = [Event(number, size) for number, size in enumerate(sizes)]
        found = self._resident([ledger.events, moments, ledger.events, ledger.events])
        parts["optimizer"] = sum(e.size for e in moments)
        parts["fragmentation"] = found - sum(parts.values())
        return Trained(found, parts, sum(len(e) for e in largest))

    def evaluation(self, held_out: Sequence[Example], settings: TrainSettings) -> int:
        """Bytes of the largest batch of the evaluation loss, where it has more records than those
        of training; else it needs less than a step, which keeps what it computes.
        """
        size = settings.eval_batch_size or settings.batch_size
        if not held_out or size <= settings.batch_size:
            return 0
        return self._asked(held_out, size)

    def scoring(self, scoring: Scoring) -> int:
        """Bytes of the largest batch whose records are scored and answered."""
        if not scoring.examples:
            return 0
        found = self._asked(scoring.examples, scoring.batch_size)
        if scoring.new_tokens and hasattr(self.model, "generate"):
            found = max(found, self._generation(scoring))
        return found

    def _asked(self, examples: Sequence[Example], size: int) -> int:
        chosen = by_length([len(e) for e in examples], size)[0]
        batch = self._collate([examples[i] for i in chosen])
        ledger = self._ledger()
        with self.shadow.mode, ledger, answering(self.model), self._active():
            loss = self.task.losses(self.model, batch)
            del loss
        return self._resident([ledger.events])

    def _generation(self, scoring: Scoring) -> int:
        """Keys and values of prompts and answers, one layer of them twice while they grow."""
        lengths = [
            len(e) if self.task.kind == "seq2seq" else max(1, len(e) - e.num_trained)
            for e in scoring.examples
        ]
        chosen = by_length(lengths, scoring.batch_size)[0]
        longest = lengths[chosen[0]]
        ids = torch.zeros(len(chosen), longest, dtype=torch.long, device=self._device)
        how: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
        if self.task.kind == "seq2seq":
            how["decoder_input_ids"] = ids[:, :1]
        ledger = self._ledger()
        with self.shadow.mode, ledger, answering(self.model), self._active():
            made = self.model(input_ids=ids, use_cache=True, **self._last_only(), **how)
            cache = made.past_key_values
            del made
            kept = ledger.live
            del cache
        grown = kept * (longest + scoring.new_tokens) // longest
        return max(self._resident([ledger.events]), grown + grown // max(1, self._num_layers))

    @property
    def _num_layers(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "num_hidden_layers", 1))

    def _last_only(self) -> dict[str, int]:
        """`generate` asks for the logits of the last position only, where the model can."""
        known = inspect.signature(type(self.model).forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    # one pass

    def _step(self, ledger: Ledger, block: Sequence[Example]) -> int:
        """Forward and backward; returns the number of events at the end of the forward pass."""
        batch = self._collate(block)
        running = self.engine.running()
        with self.shadow.mode, ledger, running, resting(self.resting), self._active():
            (loss,) = self.task.losses(self.model, batch)
            forward = len(ledger.events)
            (loss / 2).backward()
            del loss
        return forward

    def _parts(
        self, ledger: Ledger, at: int, forward: int, gradients: set[int | None]
    ) -> dict[str, int]:
        """Bytes that live at the peak, by what they are."""
        alive = ledger.alive(at)
        saved = ledger.alive(min(at, forward))
        kinds: list[str] = ["gradients", "activations", "logits", "workspace"]
        parts = dict.fromkeys(kinds, 0)
        for number, event in alive.items():
            kind = "activations" if number in saved else "workspace"
            kind = "logits" if event.wide else "gradients" if number in gradients else kind
            parts[kind] += event.size
        return parts

    def _resident(self, stretches: Sequence[Sequence[Event]]) -> int:
        """Bytes that stretches of a ledger, one after the other, take; fragments of a GPU's
        allocator are not known.
        """
        events = renumbered(stretches)
        return most_alive(events) if self._device.type == "cuda" else resident(events)

    def _ledger(self) -> Ledger:
        """A ledger for which base and adapter are there already."""
        ledger = Ledger(self.vocabulary, self._device.type)  # not what waits in the host's memory
        with self.shadow.mode:
            for tensor in (
                *self.model.parameters(),
                *self.model.buffers(),
                *tensors_of(self.adapter),
            ):
                ledger.take(tensor)
        ledger.forget()
        return ledger

    def _active(self) -> Activation:
        return Activation(self.model, self.route)

    def _collate(self, block: Sequence[Example]) -> Batch:
        return self.task.collate([block], self.model)

    def _parameters(self) -> list[nn.Parameter]:
        return list(self.adapter.parameters())

    def _training(self) -> list[nn.Parameter]:
        """Those that train in a step; others have no gradients and no moments in it."""
        idle = set(map(id, self.resting))
        return [parameter for parameter in self._parameters() if id(parameter) not in idle]

    def _drop_gradients(self) -> None:
        for parameter in self._parameters():
            parameter.grad = None

    @property
    def _device(self) -> torch.device:
        return self.shadow.request.device


def tensors_of(adapter: Adapter) -> list[Tensor]:
    """All tensors of an adapter and of those below it, whether they train or not."""
    slots = [slot for stage in adapter.stages for slot in stage.slots.values()]
    return [tensor for slot in slots for tensor in slot.tensors.values()]
