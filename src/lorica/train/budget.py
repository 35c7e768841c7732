"""What a run will need of memory, by part, before any weight is loaded.

The run is rehearsed on a shadow of the model (see `rehearsal`), over the very batches that it will
make: the largest decides the peak. To that come what does not change (weights, adapter, gradients,
optimizer) and the process itself, which is measured: Python, torch and the records take as much as
the process holds when the estimate is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lorica.attach.handle import Adapter
from lorica.attach.middle import middle_of
from lorica.attach.plates import plates_of
from lorica.base.locate import weight_files
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.data.pack import batches
from lorica.methods.method import Method
from lorica.methods.update import matrix_shape
from lorica.train.course import GROUP
from lorica.train.engine import Engine
from lorica.train.frozen import states_bytes
from lorica.train.machine import process_bytes
from lorica.train.optim import check_optim
from lorica.train.plan import total_steps
from lorica.train.rehearsal import Rehearsal, Scoring, tensors_of
from lorica.train.shadow import Lower, Shadow

EPOCHS_SEEN = 3
"""Epochs whose batches are looked through for the largest: the order differs in each."""


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
        rehearsal = Rehearsal(shadow, engine, adapter, total_steps(len(work.examples), settings))
        trained = _bytes_of(adapter.parameters())
        weights = _bytes_of([*shadow.model.parameters(), *shadow.model.buffers()])
        weights += _bytes_of(tensors_of(adapter)) - trained
        best = trained if settings.keep_best and work.held_out else 0
        states = _kept_states(shadow.model, adapter, work.examples, settings)
        steady = held + weights + states + trained + best
        _, largest = chosen_batches(work.examples, own, shadow, settings)
        training = rehearsal.training(largest, settings)
        phases = {"training": steady + training.resident}
        if not training_only:
            phases["loading"] = held + weights + (0 if gpu else file_bytes(shadow))
            phases["scoring"] = held + weights + trained + rehearsal.scoring(work.scoring)
            judged = rehearsal.evaluation(work.held_out, settings)
            phases["evaluation"] = steady + 2 * trained + judged
            if choosing := _choosing(shadow, method, adapter):
                longest = max(work.examples, key=len)
                single = rehearsal.training([longest], settings).resident
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


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def file_bytes(shadow: Shadow) -> int:
    """The weight files, which are mapped into memory while the base is loaded."""
    request = shadow.request
    files = weight_files(request.name, revision=request.revision)
    return sum(file.stat().st_size for file in files)
