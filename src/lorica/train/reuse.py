"""Whether a run reuses its frozen layers, where their outputs are kept, and what is told of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorica.attach.handle import Adapter
from lorica.attach.middle import Middle, middle_of
from lorica.config import TrainSettings
from lorica.data.encoded_cache import user_folder
from lorica.data.examples import Example
from lorica.errors import ConfigError
from lorica.records.phrases import size
from lorica.tasks.task import Task
from lorica.train.course import Course
from lorica.train.engine import Skipping
from lorica.train.frozen import FrozenLayers, frozen_layers, states_bytes, states_file
from lorica.train.machine import machine_bytes
from lorica.train.states import States, StatesInMemory, StatesOnDisk

LARGEST_SHARE = 0.5
"""Of the memory or of the disk that is free."""


@dataclass
class Reuse:
    """What the engine does around its passes.

    Attributes:
        notes: what the user should be told.
        layers: None where nothing is reused.
    """

    notes: list[str] = field(default_factory=list)
    layers: FrozenLayers | None = None

    @property
    def skipped(self) -> Skipping:
        if self.layers is None:
            return lambda blocks, batch: nullcontext()
        return self.layers.skipped

    def admit(self, model: nn.Module, adapter: Adapter) -> None:
        """Raises ConfigError where an adapter that joins acts on the layers that are skipped, or
        begins above them: its states would be those of another layer.
        """
        if self.layers is None:
            return
        middle, why = middle_of(model, [adapter])
        if middle is None or middle.index != self.layers.middle.index:
            raise ConfigError(
                f"{adapter.name!r} cannot join: reuse_frozen_layers is on, and "
                f"{why or 'it begins at another layer'}",
                expected=f"adapters that begin at layer {self.layers.middle.index + 1}, as the "
                "others",
                mend="set reuse_frozen_layers: null",
            )

    def close(self) -> None:
        if self.layers is not None:
            self.layers.close()


def reuse_of(
    model: nn.Module, task: Task, courses: Sequence[Course], settings: TrainSettings
) -> Reuse:
    """What the settings ask for, as far as this model and these adapters allow it."""
    wanted = settings.reuse_frozen_layers
    if wanted is None:
        return Reuse()
    if not courses:
        middle, why = None, "no adapter is there at the beginning"
    elif task.kind == "text-to-image":
        middle, why = None, "a picture is drawn anew in every epoch, with other noise"
    elif task.kind == "seq2seq":
        middle, why = None, "an encoder-decoder model has two stacks of layers"
    else:
        middle, why = frozen_layers(model, [course.trainee.adapter for course in courses])
    if middle is None:
        return Reuse([f"reuse_frozen_layers is off: {why}"])
    examples = {id(e): e for course in courses for e in course.examples}
    needed = states_bytes(model, [*examples.values()])
    make = _in_memory if wanted == "memory" else _on_disk
    try:
        states, where, budget = make(model, middle, [*examples.values()], needed)
    except OSError as error:
        return Reuse([f"reuse_frozen_layers is off: {error.strerror or error}"])
    fits = "" if budget >= needed else f"; {budget / needed:.0%} of the records fit"
    note = (
        f"frozen: layers 1 to {middle.index} of {len(middle.layers)} run once per record, which "
        f"then takes {size(needed)} {where}{fits}"
    )
    return Reuse([note], FrozenLayers(model, task, middle, states))


Made = tuple[States, str, int]
_Make = Callable[[Any, Middle, Sequence[Example], int], Made]


def _in_memory(model: Any, middle: Middle, examples: Sequence[Example], needed: int) -> Made:
    _, free = machine_bytes(torch.device("cpu"))
    budget = min(needed, int(LARGEST_SHARE * free))
    return StatesInMemory(budget), "of memory", budget


def _on_disk(model: Any, middle: Middle, examples: Sequence[Example], needed: int) -> Made:
    folder = user_folder() / "frozen"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = states_file(folder, model, middle)
    _remove_others(file)
    there = _bytes_of(file)
    budget = there + min(needed, int(LARGEST_SHARE * shutil.disk_usage(folder).free))
    store = StatesOnDisk(
        file,
        width=model.config.get_text_config().hidden_size,
        dtype=next(model.parameters()).dtype,
        budget=budget,
    )
    return store, f"in {folder}", budget


def _bytes_of(file: Path) -> int:
    data = Path(f"{file}.states")
    return data.stat().st_size if data.exists() else 0


def _remove_others(file: Path) -> None:
    """Keep the states of one base and one depth only: they are large, and quickly made."""
    for path in file.parent.iterdir():
        if path.suffix in (".states", ".index") and path.stem != file.name:
            path.unlink(missing_ok=True)
