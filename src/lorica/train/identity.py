"""What makes a run the same run: a checkpoint of another one is refused, with every difference."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from torch import nn

from lorica.attach.handle import Adapter
from lorica.base.digest import digest_of
from lorica.base.known import processes_of
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.tasks.task import Task, device_of
from lorica.train.course import Course
from lorica.train.measure import versions

COSMETIC = frozenset({"logging_steps", "save_steps", "save_total_limit"})
"""Settings that a resumed run may change: they change what is written, not what is learned."""

MEMORY = ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
"""Settings that a resumed run may change where memory is short: they cut the same step into other
pieces. Its records stay the same, which is part of the identity; its last bits do not.
"""


def identity(
    model: nn.Module, task: Task, courses: Sequence[Course], settings: TrainSettings
) -> dict[str, str]:
    """What must be the same for a run to go on: base, task, settings, adapters, data, by name.

    Args:
        settings: those of the run; what a course has otherwise is told beside them.
    """
    found = {
        "base": digest_of(model),
        "dtype of the base": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    found |= {f"task.{key}": _text(value) for key, value in task.facts().items()}
    found |= {f"settings.{key}": value for key, value in _settings(settings).items()}
    for course in courses:
        found |= identity_of(course, settings)
    return found


def identity_of(course: Course, settings: TrainSettings) -> dict[str, str]:
    """The part of one adapter in it, as it stands before its first step."""
    values, adapter, name = _settings(settings), course.trainee.adapter, course.name
    own = _settings(course.settings).items()
    found = {f"settings of {name}.{k}": v for k, v in own if v != values[k]}
    method = {"kind": adapter.method.kind, **asdict(adapter.method)}  # type: ignore[call-overload]
    found |= {f"{name}.{key}": _text(value) for key, value in method.items()}
    shapes = [f"{key} {tuple(p.shape)}" for key, p in adapter.named_parameters()]
    shapes += [f"{key} {digest}" for key, digest in _frozen(adapter)]
    for stage in adapter.stages[:-1]:
        lines = [f"{key} {digest}" for key, digest in _frozen(stage)]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        method = {"kind": stage.method.kind, **asdict(stage.method)}  # type: ignore[call-overload]
        trains = "together" if any(True for _ in stage.parameters()) else "frozen"
        trains += " stacked" * adapter.stacked
        found[f"{stage.name}, below {name}"] = f"{trains} {_text(method)} {digest}"
    found[f"places of {name}"] = hashlib.sha256("\n".join(shapes).encode()).hexdigest()
    found[f"records per step of {name}"] = _records_per_step(course)
    found[f"data of {name}"] = fingerprint(course.examples)
    found[f"evaluation data of {name}"] = fingerprint(course.held_out)
    return found


def _settings(settings: TrainSettings) -> dict[str, str]:
    """Those that decide what is learned."""
    free = COSMETIC.union(MEMORY)
    values = settings.model_dump(mode="json").items()
    return {key: _text(value) for key, value in values if key not in free}


def _frozen(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Name and digest of what an adapter holds and does not train: made anew when a run goes on."""
    for path, slot in adapter.slots.items():
        for key, tensor in slot.tensors.items():
            if not tensor.requires_grad:
                data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                yield f"{path}.{key}", hashlib.sha256(data.tobytes()).hexdigest()


def _records_per_step(course: Course) -> str:
    """Their number; and where records are sorted by length, how many at a time, for that decides
    which of them meet in a step.
    """
    sorted_by = f", sorted in batches of {course.settings.batch_size}" if course.group > 1 else ""
    return f"{course.per_step}{sorted_by}"


def circumstances(
    model: nn.Module, settings: TrainSettings, courses: Sequence[Course] = ()
) -> dict[str, str]:
    """What should be the same for a run to go on to the same bits; `courses`: all of the run."""
    own = {
        f"{key} of {course.name}": _text(value)
        for course in courses
        for key in MEMORY
        if (value := getattr(course.settings, key)) != getattr(settings, key)
    }
    processes = processes_of(model)
    together = {"processes that hold the base": str(processes.size)} if processes else {}
    return {
        **together,
        **{name: _text(getattr(settings, name)) for name in MEMORY},
        **own,
        "number of threads": str(torch.get_num_threads()),
        "device": device_of(model).type,
        **{f"version of {name}": version for name, version in versions().items()},
    }


def fingerprint(examples: Sequence[Example]) -> str:
    """Number and SHA-256 of encoded records: of all that a task makes numbers of, in order."""
    digest = hashlib.sha256()
    for example in examples:
        parts = example.input_ids, example.labels, getattr(example, "segments", ())
        digest.update(array("q", map(len, parts)))
        for numbers in parts:
            digest.update(array("q", numbers))
        digest.update(getattr(example, "content", b""))
    return f"{len(examples):,} examples, {digest.hexdigest()}"


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)
