"""A run that can begin: what `prepare` hands on to those who train, search and judge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorica.attach.handle import Adapter
from lorica.base.known import Base, known
from lorica.cli.material import Material
from lorica.config import Resolved
from lorica.data.encode import Encoded, Example
from lorica.tasks.task import Task
from lorica.train.choice import Relevance
from lorica.train.trial import Trial


@dataclass
class Prepared:
    """A run that can begin.

    Attributes:
        settings: with what data and base have decided.
        examples, held_out: the records of `material`, encoded.
        metrics: names of the scores.
        memory: what the run was estimated to need; empty where that was not possible.
        relevance: why the adapter is as it is, where records decided about it.
        trial: what a search on the evaluation records found, where there was one.
    """

    settings: Resolved
    material: Material
    model: nn.Module
    adapter: Adapter
    task: Task
    examples: Encoded
    held_out: list[Example]
    metrics: list[str]
    memory: dict[str, Any] = field(default_factory=dict)
    relevance: Relevance | None = None
    trial: Trial | None = None

    @property
    def base(self) -> Base:
        """What is known of the base."""
        return known(self.model)
