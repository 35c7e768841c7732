"""From what the caller gave to the courses of a run: who learns what, in how many steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from lorica.attach.activate import activate
from lorica.attach.handle import Adapter, adapters, find
from lorica.base.image_pipeline import ImagePipeline
from lorica.base.known import base_of
from lorica.config import TrainSettings
from lorica.data.encode import Example, separator_of
from lorica.errors import ConfigError, DataError
from lorica.tasks import CausalLM, Seq2Seq, TextClassification, TextToImage
from lorica.tasks.task import Task, device_of, num_positions
from lorica.train.agreement import Given, of_the_run, settings_of
from lorica.train.course import GROUP, Course
from lorica.train.director import Records
from lorica.train.engine import Trainee


def default_task(model: nn.Module, settings: TrainSettings, data: Collection[Records] = ()) -> Task:
    """The task that a model was loaded for.

    Args:
        data: the records of every adapter, which tell whether prompt and completion must be parted.

    Raises:
        ConfigError: Lorica did not load the model; or the sets of records are parted differently.
    """
    base = base_of(model)
    if base is None:
        raise ConfigError(
            "this model was not loaded by lorica.load_model, so its task is not known",
            mend="pass task=..., for example lorica.tasks.CausalLM.of(tokenizer)",
        )
    if base.task == "text-classification":
        return TextClassification(
            base.tokenizer, base.labels, settings.max_length, settings.packing
        )
    if isinstance(model, ImagePipeline):
        return TextToImage(model)
    if base.task == "seq2seq":
        return Seq2Seq(base.tokenizer, settings.max_length)
    separator = _separator(data)
    task = CausalLM.of(
        base.tokenizer,
        max_length=settings.max_length,
        packing=settings.packing,
        separator=separator,
    )
    if separator:
        task.notes.append(f"separator: {separator!r}; no white space parts prompt and completion")
    return task


def _separator(data: Collection[Records]) -> str:
    """What parts prompt and completion: the same for all adapters, which share one task."""
    asked: list[list[dict]] = []
    for records in data:
        rows = [r for r in records if isinstance(r, Mapping) and {"prompt", "completion"} <= {*r}]
        asked += [rows] if rows else []
    found = {separator_of(rows) for rows in asked}
    if len(found) > 1:
        raise ConfigError(
            "some sets of records part prompt and completion by white space, and some do not",
            expected="one way of asking for all adapters that train together",
            mend="end every prompt alike, or pass task=lorica.tasks.CausalLM.of(tokenizer, "
            "separator=...)",
        )
    return next(iter(found), "")


def total_steps(num_records: int, settings: TrainSettings) -> int:
    """Optimizer steps of a run: `max_steps`, or the epochs, whichever ends first."""
    per_step = settings.batch_size * settings.gradient_accumulation_steps
    limits = [settings.max_steps] if settings.max_steps else []
    if settings.epochs:
        steps = settings.epochs * math.ceil(num_records / per_step)
        limits.append(math.ceil(round(steps, 6)))  # 1.1 * 10 is 11.000000000000002
    return min(limits)


def courses_of(
    model: nn.Module,
    task: Task,
    data: Mapping[Adapter | str, Records],
    eval_data: Mapping[Adapter | str, Records] | Records | None,
    settings: Given,
) -> tuple[list[Course], list[str]]:
    """A course for each adapter, and what the user should be told about the records.

    Args:
        settings: for all adapters, or for each.

    Raises:
        ConfigError: settings without effect here, adapters that are not there or named twice.
        DataError: records without anything to learn, or longer than the model has positions.
    """
    if not data:
        raise ConfigError("there is nothing to train", expected="{adapter: records}")
    by_name = {find(model, key).name: records for key, records in data.items()}
    per_adapter = eval_data if isinstance(eval_data, Mapping) else None
    held_out = {find(model, key).name: records for key, records in (per_adapter or {}).items()}
    if per_adapter is None and eval_data is not None:
        held_out = dict.fromkeys(by_name, eval_data)
    strangers = sorted(held_out.keys() - by_name.keys())
    problems = [f"there is evaluation data for {n!r}, which does not train" for n in strangers]
    if len(by_name) < len(data):
        problems.append("an adapter is given twice, by handle and by name")
    problems += [
        f"{name!r} does not train by itself: {other.name!r} lies on top of it; detach that first"
        for name in by_name
        for other in adapters(model).values()
        if other.on is find(model, name)
    ]
    own = settings_of(model, by_name, settings)
    for name, one in own.items():
        who = f"{name!r}: " if len(set(own.values())) > 1 else ""
        judged = len(held_out.get(name, ())) if who else any(map(len, held_out.values()))
        problems += [who + text for text in _judging_problems(one, bool(judged))]
    problems += _settings_problems(model, task, of_the_run(settings))
    if problems := list(dict.fromkeys(problems)):
        raise ConfigError("this run cannot be planned", problems=problems)
    with activate(model, None):  # the task may have to run the base to find out
        group = GROUP if task.pads(model) else 1
    encoder = _Encoder(task)
    courses = []
    for name, records in by_name.items():
        examples = encoder(records, f"adapter {name!r}")
        if not examples:
            raise DataError(f"there are no records for adapter {name!r}", expected="at least one")
        trainee = Trainee(find(model, name), own[name], total_steps(len(examples), own[name]))
        judged = encoder(held_out.get(name, ()), f"evaluation of {name!r}")
        origins = getattr(records, "origins", ())
        courses.append(Course(trainee, examples, judged, group, origins))
    _check_lengths(model, courses)
    _check_warmup(courses)
    if problems := [text for c in courses for text in _method_problems(task, c)]:
        raise ConfigError("the method cannot run so", problems=problems)
    told = [(course.name, course.trainee.between.note()) for course in courses]
    return courses, [*encoder.notes, *(f"{name}: {note}" for name, note in told if note)]


class _Encoder:
    """Encodes each set of records once, however many adapters share it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.notes: list[str] = []
        self._known: dict[int, list[Example]] = {}

    def __call__(self, records: Any, purpose: str) -> list[Example]:
        if id(records) not in self._known:
            self._known[id(records)] = self._encode(records, purpose)
        return self._known[id(records)]

    def _encode(self, records: Any, purpose: str) -> list[Example]:
        if not len(records):
            return []
        if isinstance(records[0], Example):
            examples = list(records)
        else:
            encoded = self.task.encode(records)
            self.notes += [f"{purpose}: {note}" for note in encoded.notes]
            examples = encoded.examples
        empty = [i for i, e in enumerate(examples) if not e.num_trained]
        if empty:
            shown = ", ".join(map(str, empty[:5]))
            raise DataError(
                f"{purpose}: {len(empty):,} of {len(examples):,} examples have no trained token",
                problems=[f"examples {shown}{' ...' if empty[5:] else ''}, counted from 0"],
                expected="at least one label that is not -100 in every example",
            )
        return examples


def _judging_problems(settings: TrainSettings, evaluates: bool) -> list[str]:
    """Settings of one adapter that would be ignored."""
    return [
        f"{key}={value} has no effect: there are no records to evaluate on"
        for key in ("early_stopping_patience", "eval_steps", "eval_batch_size")
        if (value := getattr(settings, key)) is not None and not evaluates
    ]


def _settings_problems(model: nn.Module, task: Task, settings: TrainSettings) -> list[str]:
    """Settings of the run that would be ignored."""
    problems = []
    packing = getattr(task, "packing", False)
    if settings.packing != "auto" and settings.packing != packing:
        problems.append(f"packing={settings.packing} has no effect on this task ({task.kind})")
    own = task.facts().get("max_length", settings.max_length)
    if settings.max_length is not None and own != settings.max_length:
        problems.append(f"max_length={settings.max_length} has no effect: the task has {own}")
    if settings.gradient_checkpointing == "offload" and device_of(model).type == "cpu":
        problems.append("gradient_checkpointing=offload has no effect on a CPU: set it to true")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if settings.dtype not in ("auto", dtype):
        problems.append(f"dtype={settings.dtype} has no effect: the model was loaded in {dtype}")
    return problems


def _method_problems(task: Task, course: Course) -> list[str]:
    """Why a method cannot learn these records in these steps."""
    problems = course.trainee.between.problems()
    adapter = course.trainee.adapter
    trained = [part.method for part in adapter.parts]
    for method in (stage.method for stage in adapter.stages):
        if hasattr(method, "key_values") and course.settings.gradient_checkpointing:
            problems.append(
                f"gradient_checkpointing takes the cache away, and {method.kind} with it: set "
                "gradient_checkpointing: false, or use prompt-tuning"
            )
        looks = hasattr(method, "intervene") or hasattr(method, "gate")
        if not (method in trained and looks and task.kind == "causal-lm"):
            continue
        if bare := [i for i, e in enumerate(course.examples) if e.num_prompt <= 1]:
            problems.append(
                f"{method.kind} looks at prompts alone, and {len(bare):,} of the records have no "
                f"prompt, such as number {bare[0] + 1}: give records with prompts, and train_on: "
                "completion"
            )
    return problems


def _check_lengths(model: nn.Module, courses: Sequence[Course]) -> None:
    limit = num_positions(model)
    longest = max(
        max(len(e.input_ids), len(e.labels)) for c in courses for e in [*c.examples, *c.held_out]
    )
    if limit is not None and longest > limit:
        raise DataError(
            f"the longest record has {longest:,} tokens, but the model has {limit:,} positions",
            mend=f"set max_length: {limit}",
        )


def _check_warmup(courses: Sequence[Course]) -> None:
    for course in courses:
        steps, total = course.settings.warmup_steps, course.trainee.total
        if steps is not None and steps > total:
            who = f" of {course.name!r}" if len(courses) > 1 else ""
            raise ConfigError(
                f"warmup_steps={steps}{who} is more than the {total} steps of the run",
                mend="set warmup_ratio instead",
            )
