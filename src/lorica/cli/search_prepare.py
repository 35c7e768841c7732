"""Everything before the first candidate trains: data, base, encoding, and how many fit at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorica.base.known import known
from lorica.cli.anchoring import anchored
from lorica.cli.candidates import Candidates, label_of
from lorica.cli.encoding import encode, encoded_statement
from lorica.cli.forecast import (
    Forecast,
    for_each,
    forecast,
    refuse_if_far_over,
    shadow_of,
    warning_of,
)
from lorica.cli.material import Material, gather
from lorica.cli.prepare import load_base
from lorica.cli.screening import check_effects, sight, tell
from lorica.cli.start import check_start, source_of
from lorica.cli.voice import Voice
from lorica.config import Resolved
from lorica.data.encode import Encoded, Example
from lorica.data.screen import screen_quickly
from lorica.data.screen_tokens import screen_tokens
from lorica.errors import ConfigError, LoricaError, TargetError
from lorica.files.adapter import digest_of
from lorica.records.phrases import count, parameters, size
from lorica.search.halving import rung_steps
from lorica.search.samplers import number_of
from lorica.search.space import Space
from lorica.tasks.task import Task
from lorica.train.budget import Memory
from lorica.train.identity import fingerprint
from lorica.train.plan import total_steps

RESERVE = 0.8
"""Of the memory that is free; the rest is for what no estimate sees."""

_FREE = ("output_dir", "threads", "search", "cache_encoded", "save_steps", "logging_steps")
"""Settings that may differ between those who share a study."""


@dataclass
class Ground:
    """A search that can begin.

    Attributes:
        candidates: with the settings as data and base have decided.
        examples, held_out: the records, encoded.
        memory: what a run of the largest candidate was estimated to need.
        total: optimizer steps of a candidate that trains to its end.
        every: steps between evaluations.
        rungs: the steps at which candidates are compared.
        at_once: how many train together.
        why: the reason for that number.
        room: how many fit at once into the memory of this process; None where nobody knows.
    """

    candidates: Candidates
    material: Material
    model: nn.Module
    task: Task
    examples: Encoded
    held_out: Sequence[Example]
    memory: dict[str, Any]
    total: int
    every: int
    rungs: tuple[int, ...]
    at_once: int
    why: str
    room: int | None = None

    @property
    def settings(self) -> Resolved:
        return self.candidates.settings

    @property
    def space(self) -> Space:
        return self.candidates.space

    @property
    def source(self) -> Path | None:
        """The adapter that every candidate begins from; None where each begins by itself."""
        return source_of(self.settings)

    def identity(self) -> dict[str, Any]:
        """What all must have in common who work on one study."""
        values = anchored(self.settings).values
        section = dict(self.settings.run.search or {})
        kept = {key: value for key, value in values.items() if key not in _FREE}
        section = {k: v for k, v in section.items() if k not in ("storage", "at_once")}
        source = {"init_adapter": digest_of(self.source)} if self.source else {}
        return {
            **source,
            "search": section,
            "settings": _plain({key: kept[key] for key in sorted(kept)}),
            "base": known(self.model).digest,
            "training records": fingerprint(self.examples),
            "evaluation records": fingerprint(list(self.held_out)),
        }

    def voice_plan(self, voice: Voice) -> None:
        """Say what will happen."""
        number = number_of(self.space)
        places = ", ".join(map(str, self.rungs))
        compared = f"compared at step {places} and" if self.rungs else "all"
        voice.say(
            f"search: {count(number)} candidates ({self.space.sampler}), {compared} trained to "
            f"step {count(self.total)}; {self.at_once} at once ({self.why})"
        )


def prepare_search(
    candidates: Candidates,
    voice: Voice,
    *,
    ignore_memory: bool = False,
    processes: int = 1,
    beside: int = 1,
) -> Ground:
    """Read, encode, plan and load; writes nothing.

    Args:
        ignore_memory: begin although the memory of the machine will not do.
        processes: how many share the candidates.
        beside: how many of these share the memory that this one uses, itself included.

    Raises:
        LoricaError: settings, data or base with which no search can begin.
    """
    settings = candidates.settings
    for note in settings.notes:
        voice.say(note)
    check_start(settings)
    material, kind = read_material(settings, voice)
    ahead = foresee_search(candidates, material, kind, voice)
    if ahead is not None:
        candidates = ahead.candidates
        own = for_each(ahead.forecast, beside)
        if not ignore_memory:
            refuse_if_far_over(own)
        if warning := warning_of(own):
            voice.say(warning, "warning")
    with voice.work(f"loading {settings.run.model}"):
        model, settings = load_base(candidates.settings, material, kind)
    number = sum(p.numel() for p in model.parameters())
    voice.say(f"base: {type(model).__name__}, {parameters(number)} parameters, for {kind}")
    if ahead is not None:
        task, examples, held_out = ahead.encoded
    else:
        task, examples, held_out, settings = encode(settings, material, model, voice)
        settings = with_evaluations(settings, candidates.space, len(examples))
    candidates = candidates.with_settings(settings)
    voice.say(f"encoded: {encoded_statement(task, examples)}")
    tell(screen_tokens(sight(settings, material, model, examples)), settings, voice)
    found = ahead.forecast if ahead else None
    at_once, why = places_for(candidates, found, processes=processes, beside=beside)
    memory = ahead.forecast.as_dict() if ahead else {}
    total, rungs = course_of(settings, candidates.space, len(examples))
    parts = candidates, material, model, task, examples, held_out, memory
    every = eval_every(settings, len(examples))
    room = room_for(candidates, found, processes, beside) if found else None
    how: dict[str, Any] = {"at_once": at_once, "why": why, "room": room}
    return Ground(*parts, total=total, every=every, rungs=rungs, **how)


def read_material(settings: Resolved, voice: Voice) -> tuple[Material, str]:
    """The records of a search, checked, and the kind of its task.

    Raises:
        ConfigError: there are no evaluation records.
        CheckRefused: training on these records cannot work.
    """
    with voice.work("reading the data"):
        material = gather(settings.run, seed=settings.data_seed)
    for line in material.statements:
        voice.say(line)
    if not material.held_out:
        raise ConfigError(
            "a search needs evaluation records, and there are none",
            mend="set eval_data, or eval_size",
        )
    kind = material.task(settings.run.task, settings.run.model)
    check_effects(settings, material, kind)
    parts = {id(part): part for part in (material.valid, material.scored) if part}
    tell(screen_quickly(material.train, [*parts.values()]), settings, voice)
    return material, kind


def with_evaluations(settings: Resolved, space: Space, num_records: int) -> Resolved:
    """The settings with evaluations at the first rung, where nothing says when to evaluate."""
    if settings.train.eval_steps is not None or not space.how.rungs:
        return settings
    every = max(1, round(total_steps(num_records, settings.train) * space.how.rungs[0]))
    return settings.decided("eval_steps", every, "the first rung of the search")


def course_of(settings: Resolved, space: Space, num_records: int) -> tuple[int, tuple[int, ...]]:
    """(steps of a candidate that trains to its end, steps at which candidates are compared)."""
    total = total_steps(num_records, settings.train)
    return total, rung_steps(space.how.rungs, total, eval_every(settings, num_records))


def eval_every(settings: Resolved, num_records: int) -> int:
    """Steps between evaluations: as set, or an epoch."""
    train = settings.train
    per_epoch = -(-num_records // (train.batch_size * train.gradient_accumulation_steps))
    return train.eval_steps or per_epoch


@dataclass(frozen=True)
class Ahead:
    """What is known of a search before its base is loaded.

    Attributes:
        candidates: with the settings as the data has decided.
        forecast: of the candidate that needs the most memory.
    """

    candidates: Candidates
    forecast: Forecast

    @property
    def encoded(self) -> tuple[Task, Encoded, list[Example]]:
        found = self.forecast
        return found.task, found.examples, found.held_out


def foresee_search(
    candidates: Candidates, material: Material, kind: str, voice: Voice
) -> Ahead | None:
    """What the candidate that needs the most memory will need; None where that cannot be known.

    Raises:
        ConfigError: no candidate can be trained at all.
    """
    try:
        shadow = shadow_of(candidates.settings, material, kind)
    except LoricaError:  # loading the base will say it in full
        return None
    task, examples, held_out, settings = encode(candidates.settings, material, shadow.model, voice)
    settings = with_evaluations(settings, candidates.space, len(examples))
    candidates = candidates.with_settings(settings)
    problems = []
    for point in candidates.by_size():
        try:
            own = candidates.resolved(point)
            with voice.work("estimating the memory"):
                found = forecast(own, material, shadow, (task, examples, held_out, own))
            return Ahead(candidates, found)
        except (ConfigError, TargetError) as error:  # told again when it would join
            problems.append(f"{label_of(point)}: {'; '.join([error.what, *error.problems[:1]])}")
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            text = next(iter(str(error).splitlines()), type(error).__name__)
            voice.say(f"the memory of this search could not be estimated: {text}")
            return None
    raise ConfigError("no candidate can be trained", problems=problems[:10])


def places_for(
    candidates: Candidates, found: Forecast | None, *, processes: int = 1, beside: int = 1
) -> tuple[int, str]:
    """(how many candidates train at once, why).

    Args:
        processes: how many share the candidates.
        beside: how many of these share one memory.
    """
    most = number_of(candidates.space)
    if candidates.space.how.at_once:
        return min(most, candidates.space.how.at_once), "as set"
    if found is None:
        return min(most, processes), "the memory could not be estimated"
    room = processes * room_for(candidates, found, processes, beside)
    if room >= most:
        return most, "all of them fit"
    free, each = found.free // beside, " for each process" if processes > 1 else ""
    return room, f"so many fit into {size(RESERVE * free)} of free memory{each}"


def room_for(candidates: Candidates, found: Forecast, processes: int, beside: int) -> int:
    """How many candidates fit at once into one process; arguments as of `places_for`."""
    of_each = -(-number_of(candidates.space) // processes)
    return fitting(found.memory, found.process, found.free // beside, of_each)


def fitting(memory: Memory, process: int, free: int, most: int) -> int:
    """How many candidates fit at once into one process, at least one.

    The base is there once; adapter, optimizer and what a pass keeps come with every candidate that
    trains. Of one that has ended the adapter stays to the end of the search, where the winner and
    the largest rank are looked at.

    Args:
        memory: of a run of one, the largest.
        process: bytes that the process holds already.
        free: bytes that are free besides.
        most: candidates that the process trains in all.
    """
    shared = memory.process + memory.weights + memory.states
    ended = memory.adapter
    each = max(ended + 1, memory.phases["training"] - shared)
    left = RESERVE * free - (memory.total - process) + each  # what the first one needs is in total
    return max(1, min(most, int((left - most * ended) // (each - ended))))


def _plain(value: Any) -> Any:
    """As JSON gives it back, so that it compares equal."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value
