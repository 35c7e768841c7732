"""What is told of a run: its report, and what run.json says of base, adapters and plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lorica.attach.handle import Adapter
from lorica.base.known import base_of
from lorica.base.storage import num_parameters
from lorica.config.settings import method_values
from lorica.methods.method import becomes_weight
from lorica.tasks.task import Task
from lorica.train.course import Course
from lorica.train.measure import versions


@dataclass(frozen=True)
class TrainReport:
    """What a run did, by adapter name.

    Attributes:
        steps: optimizer steps done.
        loss: mean training loss of the last logged window (nats per trained token).
        eval_loss: of the adapter that was kept; None without evaluation data.
        best_step: the step whose tensors were kept.
        stopped: why training ended early; None where it did not.
        failed: what was not finite, which ended an adapter; None where all was well.
        folders: where the adapters were written; one that failed may have none.
        seconds: spent in optimizer steps, over all tries of a resumed run.
        tokens_per_second, peak_memory_bytes: of the run.
        resources: these and what else run.json says of them.
        adapters: what each is in the end: num_parameters, num_places, method; for run.json.
    """

    steps: dict[str, int]
    loss: dict[str, float | None]
    eval_loss: dict[str, float | None]
    best_step: dict[str, int]
    stopped: dict[str, str | None]
    folders: dict[str, Path]
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    resources: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str | None] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The outcome as plain values, for run.json."""
        names = ("steps", "loss", "eval_loss", "best_step", "stopped", "failed")
        return {name: getattr(self, name) for name in names}

    def outcome(self) -> dict[str, Any]:
        """The entries of run.json that are known when training is over."""
        first = next(iter(self.adapters.values()))
        return {
            "method": first["method"],
            "adapters": self.adapters,
            "training": self.summary(),
            "resources": self.resources,
        }


def manifest(
    model: nn.Module,
    task: Task,
    courses: Sequence[Course],
    *,
    seed: int,
    dtype: str,
    adapters: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """The entries of run.json that are known when training begins.

    Args:
        courses: of at least one adapter.
        dtype: of the base.
        adapters: the `entry` of each.
    """
    base, first = base_of(model), courses[0]
    name = type(model).__name__
    return {
        "versions": versions(),
        "base": {
            "name": base.name if base else name,
            "digest": base.digest if base else None,
            "num_parameters": num_parameters(model),
            "dtype": dtype,
            "architecture": name,
        },
        "task": task.kind,
        "seed": seed,
        "method": _method(first.trainee.adapter),
        "adapters": dict(adapters),
        "plan": {
            "max_steps": max(c.trainee.total for c in courses),
            "epochs": max(c.trainee.total / c.steps_per_epoch for c in courses),
            "batch_size": first.per_step,
        },
    }


def entry(course: Course, path: Path) -> dict[str, Any]:
    """What run.json says of an adapter.

    Args:
        path: where it is written in the end.
    """
    adapter = course.trainee.adapter
    return {
        **_shape(course),
        "reason": adapter.reason,
        "on": [stage.method.kind for stage in adapter.stages[:-1]],
        "path": str(path),
        "merges": all(
            becomes_weight(slot.method) for stage in adapter.stages for slot in stage.slots.values()
        ),
    }


def provenance(course: Course, task: Task, data: str) -> dict[str, Any]:
    """Where an adapter comes from, and how its base must be asked.

    Args:
        data: digest of its records.
    """
    return {
        "task": task.facts(),
        "versions": versions(),
        "data_digest": data,
        "steps": course.step,
        "settings": course.settings.model_dump(mode="json"),
    }


def _shape(course: Course) -> dict[str, Any]:
    """What an adapter is as it stands; a method may leave less than it began with."""
    adapter = course.trainee.adapter
    parts = adapter.parts
    together = {"together": [_method(part) for part in parts[:-1]]} if parts[1:] else {}
    return {
        "num_parameters": adapter.num_parameters,
        "num_places": sum(len(part.slots) for part in parts),
        "method": _method(adapter),
        **together,
    }


def _method(adapter: Adapter) -> dict[str, Any]:
    return {"kind": adapter.method.kind, **method_values(adapter.method)}
