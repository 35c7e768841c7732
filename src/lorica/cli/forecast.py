"""What a run will need, found out before its weights are loaded: for `lorica plan` and for `train`.

The settings, the records and their encoding are those of the run, through the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from lorica.cli.encoding import encode
from lorica.cli.material import Material
from lorica.cli.start import lower_of
from lorica.cli.voice import Voice
from lorica.config import Resolved, TrainSettings
from lorica.data.encode import Encoded, Example
from lorica.errors import CheckRefused, LoricaError
from lorica.methods.method import Method
from lorica.records.phrases import count, size
from lorica.records.signals import signals_wait
from lorica.tasks.task import Task
from lorica.train.adamw_8bit import SMALLEST
from lorica.train.budget import Memory, Work, estimate
from lorica.train.machine import machine_bytes, process_bytes
from lorica.train.optim import moment_sizes
from lorica.train.plan import courses_of
from lorica.train.rehearsal import Scoring
from lorica.train.shadow import Lower, Request, Shadow, make_shadow, try_out

FAR_OVER = 1.5
"""Times the memory of the machine from which on a run is refused: paging cannot save it."""
LITTLE = 50
"""Moments that are less than this part of the memory are not worth rounding."""


@dataclass(frozen=True)
class Forecast:
    """An estimate with everything that it was made from.

    Attributes:
        settings: with what the data has decided.
        shadow: the base without weights.
        method: the adapter's settings, with the new parts of the base that must be trained too.
        lower: the adapters below it.
        process: bytes that the process held before the run.
        machine, free: bytes of memory there, and of it free when the estimate was made.
    """

    settings: Resolved
    shadow: Shadow
    task: Task
    examples: Encoded
    held_out: list[Example]
    method: Method
    work: Work
    memory: Memory
    process: int
    machine: int
    free: int
    lower: tuple[Lower, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the run finds its memory as things are now."""
        return self.memory.total - self.process <= self.free

    def as_dict(self) -> dict[str, Any]:
        """The entry "memory" of the plan in run.json."""
        return {**self.memory.as_dict(), "machine": self.machine, "free": self.free}


def request_of(settings: Resolved, material: Material, kind: str) -> Request:
    """The base as the run will load it."""
    run = settings.run
    return Request(
        run.model,
        kind,
        settings.train.dtype,
        material.labels if kind == "text-classification" else (),
        run.revision or "main",
        run.trust_remote_code,
        run.eos_token,
        run.quantize,  # type: ignore[arg-type]
    )


@signals_wait()
def forecast(
    settings: Resolved,
    material: Material,
    shadow: Shadow,
    encoded: Any,
    lower: tuple[Lower, ...] = (),
) -> Forecast:
    """Estimate a run.

    Args:
        encoded: (task, examples, held-out examples, settings), as `prepare` encodes them.
        lower: the adapters below that of the run; see `cli.start.lower_of`.

    Raises:
        LoricaError: settings with which no run can begin.
    """
    task, examples, held_out, settings = encoded
    method: Any = settings.method
    given = tuple(getattr(method, "modules_to_save", None) or ())
    new = tuple(name for name in shadow.base.new_modules if name not in given)
    method = replace(method, modules_to_save=(*given, *new)) if new else method
    try_out(shadow, task, examples.examples)
    tested = task.encode(material.scored).examples if material.scored else []
    new_tokens = settings.run.max_new_tokens if material.generates else 0
    work = Work(examples.examples, held_out, Scoring(tested, new_tokens=new_tokens))
    if tested:  # what scores brings libraries of its own, which count too
        for name in ("metrics", "compare"):
            import_module(f"lorica.evaluate.{name}")
    process = process_bytes() if shadow.request.device.type == "cpu" else 0
    with shadow.adapted(method, lower) as adapter:  # refuses what a run would refuse
        courses_of(shadow.model, shadow.task(task), {adapter: examples}, held_out, settings.train)
    how: dict[str, Any] = {"lower": lower, "process": process}
    memory = estimate(shadow, method, task, work, settings.train, **how)
    machine, free = machine_bytes(shadow.request.device)
    parts = settings, shadow, task, examples, held_out, method, work, memory
    return Forecast(*parts, process, machine, free, lower)


@signals_wait()
def shadow_of(settings: Resolved, material: Material, kind: str) -> Shadow:
    """The base of a run without its weights. Raises BaseModelError."""
    return make_shadow(request_of(settings, material, kind))


def warning_of(found: Forecast) -> str | None:
    """What to warn of, with the way out where there is one; None where the run fits."""
    verdict = _verdict_on(found)
    remedy = _way_out(found) if verdict else None
    return f"{verdict}; {remedy}" if remedy else verdict


def _verdict_on(found: Forecast) -> str | None:
    memory = found.memory
    if memory.total > found.machine:
        return (
            f"this run needs about {size(memory.total)} ({memory.phase}); the machine has "
            f"{size(found.machine)} in all"
        )
    if not found.fits:
        return (
            f"this run needs about {size(memory.total - found.process)} more ({memory.phase}); "
            f"{size(found.free)} are free now"
        )
    return None


def _way_out(found: Forecast) -> str | None:
    """The first settings under which a run that does not fit finds its memory, and makes the same
    optimizer steps; None where none of them do.
    """
    train = found.settings.train
    checkpointing = {} if train.gradient_checkpointing else {"gradient_checkpointing": True}
    tried: list[dict[str, Any]] = [checkpointing] if checkpointing else []
    for parts in (2, 4, 8):
        if train.batch_size % parts == 0:
            number = parts * train.gradient_accumulation_steps
            halved = {
                "batch_size": train.batch_size // parts,
                "gradient_accumulation_steps": number,
            }
            tried += [halved, halved | checkpointing] if checkpointing else [halved]
    if found.shadow.request.device.type != "cpu" and train.gradient_checkpointing != "offload":
        offload = {"gradient_checkpointing": "offload"}  # the last resort: every layer's input
        smallest = tried[-1] if tried else {}
        tried += [offload, smallest | offload]  # goes over the bus twice
    others = [need for phase, need in found.memory.phases.items() if phase != "training"]
    for changes in tried:
        try:
            memory = _again(found, train=_with(train, **changes))
        except LoricaError:  # this base has no checkpointing
            continue
        total = max(memory.total, *others)
        if total - found.process <= found.free:
            named = ", ".join(f"{key}: {str(value).lower()}" for key, value in changes.items())
            return f"it would fit with {named} ({size(total)})"
    return None


def for_each(found: Forecast, number: int) -> Forecast:
    """An estimate for one of so many processes that share the memory."""
    return replace(found, free=found.free // number, machine=found.machine // number)


def refuse_if_far_over(found: Forecast) -> None:
    """Raises CheckRefused where no paging could save the run."""
    if found.memory.total <= FAR_OVER * found.machine:
        return
    cheaper = [a for a in alternatives(found) if a.memory.total < found.memory.total]
    raise CheckRefused(
        _verdict_on(found) or "",
        problems=[f"{a.change}: {size(a.memory.total)}" for a in cheaper],
        expected=f"at most {FAR_OVER:g} times the memory of the machine",
        mend="choose one of these or a smaller base; --ignore-memory trains all the same",
    )


def note_on_moments(found: Forecast) -> str:
    """What moments in 8 bits save in this run, or would: little beside a base, where few numbers
    train.
    """
    train = found.settings.train
    with found.shadow.adapted(found.method, found.lower) as adapter:
        wide, narrow = (
            sum(sum(moment_sizes(p, _with(train, optim=word))) for p in adapter.parameters())
            for word in ("adamw", "adamw_8bit")
        )
    saved, all_of_it = wide - narrow, found.memory.phases["training"]
    if train.optim == "adamw_8bit":
        return f"optim: adamw_8bit saves {size(saved)}, beside {size(all_of_it)} in training"
    if not saved:
        return (
            f"optim: adamw_8bit would save nothing: no tensor that trains has {SMALLEST:,} numbers"
        )
    share = saved / all_of_it
    little = ": little, since few numbers train" if share < 1 / LITTLE else ""
    return f"optim: adamw_8bit would save {size(saved)} of {size(all_of_it)} in training{little}"


@dataclass(frozen=True)
class Alternative:
    """Other settings of a run and what they would need; `price` is what they cost."""

    change: str
    memory: Memory
    price: str


def alternatives(found: Forecast) -> list[Alternative]:
    """Cheaper settings, each by itself, estimated as the run was; the most saved first."""
    made = []
    for change, price, other in _changes(found):
        try:
            memory = _again(found, **other)
        except LoricaError:  # this base or this method does not offer it
            continue
        made.append(Alternative(change, memory, price))
    return sorted(made, key=lambda a: a.memory.phases["training"])


def _again(
    found: Forecast,
    *,
    train: TrainSettings | None = None,
    method: Any = None,
    work: Work | None = None,
    base: dict[str, str] | None = None,
) -> Memory:
    shadow = found.shadow
    if base is not None:
        shadow = make_shadow(replace(shadow.request, **base))  # type: ignore[arg-type]
        shadow.packs, shadow.plain = found.shadow.packs, found.shadow.plain
        shadow.place = found.shadow.place
    return estimate(
        shadow,
        method or found.method,
        found.task,
        work or found.work,
        train or found.settings.train,
        lower=found.lower,
        process=found.process,
        training_only=True,
    )


def _changes(found: Forecast) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(change, price, arguments of `_again`)."""
    train, method = found.settings.train, found.method
    size, number = train.batch_size, train.gradient_accumulation_steps
    if size % 2 == 0:
        text = f"batch_size: {size // 2} with gradient_accumulation_steps: {2 * number}"
        other = {"batch_size": size // 2, "gradient_accumulation_steps": 2 * number}
        yield text, "the same optimizer steps, somewhat slower", {"train": _with(train, **other)}
    if not train.gradient_checkpointing:
        other = _with(train, gradient_checkpointing=True)
        yield (
            "gradient_checkpointing: true",
            "about a third more time; the same numbers",
            {"train": other},
        )
    if train.optim == "adamw" and found.memory.optimizer > found.memory.total // LITTLE:
        other = {"train": _with(train, optim="adamw_8bit")}
        yield "optim: adamw_8bit", "moments rounded to 8 bits", other
    if shorter := _shorter(found):
        yield shorter
    rank = getattr(method, "r", 0)
    if rank >= 2:
        other = {"method": replace(method, r=rank // 2)}  # type: ignore[type-var]
        yield f"r: {rank // 2}", "an adapter that can hold less", other
    virtual = getattr(method, "num_virtual_tokens", 0)
    if virtual >= 2:
        other = {"method": replace(method, num_virtual_tokens=virtual // 2)}  # type: ignore[type-var]
        yield f"num_virtual_tokens: {virtual // 2}", "an adapter that can hold less", other
    if getattr(method, "target_modules", None) not in (None, "attention"):
        other = {"method": replace(method, target_modules="attention")}  # type: ignore[type-var]
        yield "target_modules: attention", "the other layers do not learn", other
    if next(found.shadow.model.parameters()).dtype == torch.float32:
        price = "rounds to 8 bits; slow on processors without it"
        yield "dtype: bfloat16", price, {"base": {"dtype": "bfloat16"}}
    if not found.shadow.request.quantize:
        for word, price in _QUANTIZED.items():
            yield f"quantize: {word}", price, {"base": {"quantize": word}}


_QUANTIZED = {
    "int8": "weights rounded to 8 bits; unpacked in every step",
    "nf4": "weights rounded to 4 bits, which costs accuracy; unpacked in every step",
}
"""Quantizer -> its price."""


def _with(train: TrainSettings, **other: Any) -> TrainSettings:
    return TrainSettings(**{**train.model_dump(), **other})


def _shorter(found: Forecast) -> tuple[str, str, dict[str, Any]] | None:
    """max_length where nineteen of twenty records fit, if that is less than the longest."""
    lengths = sorted(len(e) for e in found.examples)
    limit = max(8, lengths[len(lengths) * 19 // 20])
    cut = sum(length > limit for length in lengths)
    if not cut:
        return None
    work = replace(found.work, examples=_cut(found.examples.examples, limit, found.task.kind))
    price = f"cuts {count(cut)} of {count(len(lengths))} records"
    return f"max_length: {limit}", price, {"work": work}


def _cut(examples: Sequence[Example], limit: int, kind: str) -> list[Example]:
    made = []
    for example in examples:
        labels = example.labels
        if kind != "text-classification":
            labels = labels[-limit:] if kind == "causal-lm" else labels[:limit]
        changes: dict[str, Any] = {"input_ids": example.input_ids[:limit], "labels": labels}
        if hasattr(example, "segments"):
            changes["segments"] = example.segments[:limit]  # type: ignore[attr-defined]
        made.append(replace(example, **changes))
    return made


def foresee(
    settings: Resolved, material: Material, kind: str, voice: Voice, *, ignore_memory: bool
) -> Forecast | None:
    """What the run will need, told before the base is loaded; None where it cannot be known.

    Raises:
        CheckRefused: far more memory than the machine has.
        LoricaError: records or settings with which no run can begin.
    """
    if settings.run.shard_base:
        voice.say("the memory of a base that processes hold together is not estimated")
        return None
    lower = lower_of(settings)
    try:
        shadow = shadow_of(settings, material, kind)
    except LoricaError:  # loading the base will say it in full
        return None
    encoded = encode(settings, material, shadow.model, voice)
    try:
        with voice.work("estimating the memory"):
            found = forecast(settings, material, shadow, encoded, lower)
    except (LoricaError, RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        text = next(iter(str(error).splitlines()), type(error).__name__)
        if not isinstance(error, LoricaError):  # else attaching will say it in full
            voice.say(f"the memory of this run could not be estimated: {text}")
        return None
    if not ignore_memory:
        refuse_if_far_over(found)
    if warning := warning_of(found):
        voice.say(warning, "warning")
    return found
