"""What is known of a base model that Lorica loaded; it is kept with the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lorica.base.processes import Processes


@dataclass
class Base:
    """What is known of a base model that Lorica loaded; kept with the model.

    Attributes:
        name: hub id as given, or the absolute path of the folder: adapters record it.
        task: what it was loaded for.
        digest: SHA-256 over the weight files; of a quantized base over its packed weights. Empty
            where the weights were changed since.
        tokenizer: as transformers loads it, padding on the right.
        labels: names of the classes, in order of their index; empty for other tasks.
        new_modules: modules that the weight files lack and that were started at random: they must
            be trained.
        quantize: the word of the quantizer that its layers went through on the way in; None where
            they lie as the files have them.
        processes: those that hold it together; None where this one has all of it.
        notes: what the user should be told.
    """

    name: str
    task: str
    digest: str
    tokenizer: Any = None
    labels: tuple[str, ...] = ()
    new_modules: tuple[str, ...] = ()
    quantize: str | None = None
    processes: Processes | None = None
    notes: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, str]:
        """What an adapter's files say of their base."""
        found = {"name": self.name, "task": self.task, "digest": self.digest}
        return {**found, "quantize": self.quantize} if self.quantize else found


def base_of(model: nn.Module) -> Base | None:
    """What is known of `model`, or None where Lorica did not load it."""
    return model.__dict__.get("_lorica_base")


def known(model: nn.Module) -> Base:
    """What is known of a model that Lorica loaded."""
    base = base_of(model)
    assert base is not None
    return base


def processes_of(model: nn.Module) -> Processes | None:
    """The processes that hold the model together; None where this one has all of it."""
    base = base_of(model)
    return base.processes if base is not None else None
