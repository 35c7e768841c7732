"""What a run will need of memory, by part, before any weight is loaded.

The model is run as a shadow (see `shadow`), and what it would allocate is written down (see
`ledger`), over the very batches that the run will make: the largest decides the peak. To that come
what does not change (weights, adapter, gradients, optimizer) and the process itself, which is
measured: Python, torch and the records take as much as the process holds when the estimate is made.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.activate import Activation
from lorica.attach.handle import Adapter
from lorica.attach.middle import middle_of
from lorica.attach.plates import plates_of
from lorica.base.load import weight_files
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.data.pack import batches
from lorica.errors import ConfigError
from lorica.methods.method import Method
from lorica.methods.update import matrix_shape
from lorica.tasks.task import Batch, answering, by_length
from lorica.train.course import GROUP
from lorica.train.engine import Engine, at_rest, between_of, resting, route_of
from lorica.train.frozen import states_bytes
from lorica.train.ledger import Event, Ledger, most_alive, renumbered, resident
from lorica.train.measure import memory_bytes
from lorica.train.optim import check_optim, moment_sizes
from lorica.train.plan import total_steps
from lorica.train.shadow import Lower, Shadow

EPOCHS_SEEN = 3
"""Epochs whose batches are looked through for the largest: the order differs in each."""


@dataclass(frozen=True)
class Scoring:
    """What base and tuned are scored on. `new_tokens` 0: nothing is generated."""

    examples: Sequence[Example] = ()
    batch_size: int = 32
    new_tokens: int = 0


@dataclass(frozen=True)
class Work:
    """What a run works on.

    Attributes:
        examples: training records, encoded.
        held_out: evaluation records, encoded.
        scoring: see `Scoring`.
    """

    examples: Sequence[Example]
    held_out: Sequence[Example] = ()
    scoring: Scoring = field(default_factory=Scoring)


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs at its peak. The parts are those of training, and add up to it.

    Attributes:
        process: what the process held when the estimate was made; 0 on a GPU.
        weights: of the frozen base.
        states: outputs of frozen layers that are kept in memory, of all records.
        adapter: tensors that train, and the copy of the best where evaluations choose it.
        gradients, optimizer: of the adapter; what its method keeps counts with the optimizer.
        activations: saved by the forward pass for the backward pass.
        logits: everything that has one number per word of the vocabulary.
        workspace: other tensors of the moment of the peak.
        fragmentation: freed memory that the allocator keeps.
        phase: when the peak is: "loading", "scoring", "evaluation", "choosing" (of what records
            decide about the adapter) or "training".
        phases: the peak of each.
        batch_tokens: of the largest batch, padding left out.
    """

    process: int
    weights: int
    states: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    fragmentation: int
    phase: str
    phases: dict[str, int]
    batch_tokens: int

    PARTS = (
        "process",
        "weights",
        "states",
        "adapter",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "workspace",
        "fragmentation",
    )

    @property
    def total(self) -> int:
        return max(self.phases.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for run.json."""
        parts = {part: getattr(self, part) for part in self.PARTS}
        return {
            "total": self.total,
            "parts": parts,
            "phase": self.phase,
            "phases": self.phases,
            "batch_tokens": self.batch_tokens,
        }


def estimate(
    shadow: Shadow,
    method: Method,
    task: Any,
    work: Work,
    settings: TrainSettings,
    *,
    lower: Sequence[Lower] = (),
    process: int | None = None,
    training_only: bool = False,
) -> Memory:
    """The memory of a run.

    Args:
        method: the adapter's settings.
        task: of the run; it is not changed.
        lower: the adapters below it, the lowest first.
        process: bytes that the process holds without the run; None: measured now.
        training_only: leave loading, scoring and evaluation out, for a comparison.

    Raises:
        TargetError, ConfigError: the adapter does not fit the base.
    """
    gpu = shadow.request.device.type == "cuda"
    held = 0 if gpu else process_bytes() if process is None else process
    own = shadow.task(task)
    with shadow.adapted(method, lower) as adapter, _engine(shadow.model, own, settings) as engine:
        check_optim(adapter.named_parameters(), settings)
        runner = _Runner(shadow, engine, adapter, total_steps(len(work.examples), settings))
        trained = _bytes_of(adapter.parameters())
        weights = _bytes_of([*shadow.model.parameters(), *shadow.model.buffers()])
        weights += _bytes_of(_held(adapter)) - trained
        best = trained if settings.keep_best and work.held_out else 0
        states = _kept_states(shadow.model, adapter, work.examples, settings)
        steady = held + weights + states + trained + best
        _, largest = chosen_batches(work.examples, own, shadow, settings)
        training = runner.training(largest, settings)
        phases = {"training": steady + training.resident}
        if not training_only:
            phases["loading"] = held + weights + (0 if gpu else file_bytes(shadow))
            phases["scoring"] = held + weights + trained + runner.scoring(work.scoring)
            judged = runner.evaluation(work.held_out, settings)
            phases["evaluation"] = steady + 2 * trained + judged
            if choosing := _choosing(shadow, method, adapter):
                longest = max(work.examples, key=len)
                single = runner.training([longest], settings).resident
                phases["choosing"] = held + weights + choosing + single
    return Memory(
        process=held,
        weights=weights,
        states=states,
        adapter=trained + best,
        **training.parts,
        phase=max(phases, key=lambda name: phases[name]),
        phases=phases,
        batch_tokens=training.tokens,
    )


def _kept_states(
    model: nn.Module, adapter: Adapter, examples: Sequence[Example], settings: TrainSettings
) -> int:
    """Bytes of what the layers below the adapter say, where a run keeps it in memory: at most, as
    only a run finds out whether it can.
    """
    if settings.reuse_frozen_layers != "memory" or middle_of(model, [adapter])[0] is None:
        return 0
    return states_bytes(model, examples)


def _choosing(shadow: Shadow, method: Method, adapter: Adapter) -> int:
    """Bytes for a choice by gradients: in float32 the sum and a copy of it for every weight, and
    one gradient of the largest in float32 and in the dtype of the base.
    """
    if not getattr(method, "needs_gradients", False):
        return 0
    sizes = [
        math.prod(matrix_shape(plates.layer))
        for module in shadow.model.modules()
        for plates in plates_of(module)
        if adapter.name in plates.slots and not plates.slots[adapter.name].method.replaces
    ]
    return 8 * sum(sizes) + 8 * max(sizes)


@dataclass(frozen=True)
class _Trained:
    """What steps take beyond what is there all the time: at most `resident` bytes, `parts` of it by
    kind; `tokens` of the largest batch.
    """

    resident: int
    parts: dict[str, int]
    tokens: int


class _Runner:
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

    def training(self, largest: Sequence[Example], settings: TrainSettings) -> _Trained:
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
        return _Trained(found, parts, sum(len(e) for e in largest))

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
            for tensor in (*self.model.parameters(), *self.model.buffers(), *_held(self.adapter)):
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


def chosen_batches(
    examples: Sequence[Example], task: Any, shadow: Shadow, settings: TrainSettings
) -> tuple[list[Example], list[Example]]:
    """A batch of middling size and the largest that the run will meet."""
    packed = not task.pads(shadow.model)
    lengths = [len(e.input_ids) + len(e.labels) for e in examples]
    size, number = settings.batch_size, settings.gradient_accumulation_steps
    left = total_steps(len(examples), settings) * number
    found: list[tuple[int, int, list[int]]] = []
    for epoch in range(EPOCHS_SEEN):
        group = 1 if packed else GROUP
        made = batches(lengths, batch_size=size, seed=settings.seed, epoch=epoch, group=group)
        found += [(*_cost([examples[i] for i in b], packed), b) for b in made[: max(0, left)]]
        left -= len(made)
    found.sort()
    usual, largest = found[len(found) // 2][2], found[-1][2]
    return [examples[i] for i in usual], [examples[i] for i in largest]


def _cost(block: Sequence[Example], packed: bool) -> tuple[int, int]:
    """Tokens that are computed, then the longest record."""
    longest = max(len(e) for e in block)
    if packed:
        return sum(len(e) for e in block), longest
    targets = max(len(e.labels) for e in block)
    return len(block) * (longest + targets), longest


@contextmanager
def _engine(model: nn.Module, task: Any, settings: TrainSettings) -> Iterator[Engine]:
    engine = Engine(model, task, gradient_checkpointing=settings.gradient_checkpointing)
    try:
        yield engine
    finally:
        engine.close()


def _held(adapter: Adapter) -> list[Tensor]:
    """All tensors of an adapter and of those below it, whether they train or not."""
    slots = [slot for stage in adapter.stages for slot in stage.slots.values()]
    return [tensor for slot in slots for tensor in slot.tensors.values()]


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def file_bytes(shadow: Shadow) -> int:
    """The weight files, which are mapped into memory while the base is loaded."""
    request = shadow.request
    files = weight_files(request.name, revision=request.revision)
    return sum(file.stat().st_size for file in files)


def process_bytes() -> int:
    """Resident memory of this process now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):  # not Linux
        return memory_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def machine_bytes(device: torch.device) -> tuple[int, int]:
    """Memory that this machine has, and of it what is free: of the GPU where one is used; a limit
    that a container sets counts.
    """
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return whole, free
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return whole, whole
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
    whole, free = (1024 * int(fields.get(key, 0)) for key in ("MemTotal", "MemAvailable"))
    limit, used = (_cgroup(name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < whole:
        whole, free = limit, min(free, max(0, limit - (used or 0)))
    return whole, free


def _cgroup(name: str) -> int | None:
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
