"""How the adapter of a run begins: by itself, or by what the records decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorica.attach.attach import attach
from lorica.attach.handle import Adapter
from lorica.cli.opening import adapter_folder
from lorica.cli.voice import Voice
from lorica.config import Resolved
from lorica.data.encode import Encoded, Example
from lorica.errors import ConfigError
from lorica.files.adapter import check_folder, load_adapter
from lorica.files.transfer import begin_from
from lorica.methods.method import is_chosen
from lorica.tasks.task import Task
from lorica.train.choice import Relevance
from lorica.train.shadow import Lower
from lorica.train.starts import attach_by_records
from lorica.train.trial import Trial, choose_top_layers

ADAPTER, BELOW = "default", "below"


@dataclass(frozen=True)
class Begun:
    """An adapter on its base.

    Attributes:
        settings: of the run, with what a trial decided.
        relevance: why the adapter is as it is, where records decided about it.
        trial: what a search on the evaluation records found, where there was one.
    """

    settings: Resolved
    adapter: Adapter
    relevance: Relevance | None = None
    trial: Trial | None = None


def check_start(settings: Resolved) -> Path | None:
    """Refuse what no run can begin with, before anything is read; returns `source_of`.

    Raises:
        ConfigError, AdapterFileError: a metric that there is not, or a start that is none.
    """
    if settings.run.metrics:
        from lorica.evaluate.metrics import find_metrics  # scikit-learn takes its time

        find_metrics(settings.run.metrics)
    waits_for_records(settings)
    return source_of(settings)


def source_of(settings: Resolved) -> Path | None:
    """The adapter folder that a run begins from; None where it begins by itself.

    Raises:
        ConfigError: its start would be decided twice.
        AdapterFileError: there is no adapter.
    """
    given = settings.run.init_adapter
    if given is None:
        return None
    method: Any = settings.method
    undone = [
        f"{name}: {getattr(method, name)}"
        for name in ("init_lora_weights", "prompt_tuning_init", "reinit_top_layers")
        if hasattr(method, name) and getattr(method, name) != _default(method, name)
    ]
    if is_chosen(method) and not undone:
        undone = ["a start that is chosen"]
    if undone:
        raise ConfigError(
            f"{settings.origins['init_adapter']}: init_adapter would undo {' and '.join(undone)}",
            mend="keep one of them",
        )
    folder = adapter_folder(Path(given)) or Path(given)
    check_folder(folder)
    return folder


def _default(method: Any, name: str) -> Any:
    return type(method).__dataclass_fields__[name].default


def waits_for_records(settings: Resolved) -> bool:
    """Whether something is chosen before there can be an adapter, most often by the records.

    Raises:
        ConfigError: it would decide about the bare base, and another adapter acts on it.
    """
    method: Any = settings.method
    by_records = is_chosen(method)
    anew = bool(getattr(method, "reinit_top_layers", 0))
    tried = bool(getattr(method, "candidates", ()))
    if settings.run.on_adapter is not None and (by_records or anew or tried):
        which = "what records decide" if by_records else "reinit_top_layers"
        raise ConfigError(
            f"{settings.origins['on_adapter']}: {which} is about the bare base, and the adapter of "
            "on_adapter acts on it",
            mend="keep one of them",
        )
    parts = (*settings.below, method) if settings.below else ()
    if alone := [one.kind for one in parts if hasattr(one, "between")]:
        raise ConfigError(
            f"{settings.origins['method']}: {alone[0]} acts between the steps of its own training, "
            "so it trains alone",
            mend="take it out of the list; or train it first, and the others on top: stages",
        )
    if any(
        getattr(one, "needs_records", False) or (hasattr(one, "candidates") and one.candidates)
        for one in parts
    ):
        raise ConfigError(
            f"{settings.origins['method']}: a start that records decide is that of one method "
            "alone, and here several train together",
            mend="take that start out, or train it first, and the others on top: stages",
        )
    return by_records or tried


def lower_of(settings: Resolved) -> tuple[Lower, ...]:
    """What will lie below the adapter of a run, the lowest first.

    Raises:
        AdapterFileError: on_adapter names no adapter.
    """
    found = [Lower(method, trains=True) for method in settings.below]
    if settings.run.on_adapter is not None:
        given = Path(settings.run.on_adapter)
        found.insert(0, Lower(adapter_folder(given) or given))
    return tuple(found)


def stacked(model: nn.Module, method: Any, lower: Sequence[Lower], *, seed: int) -> Adapter:
    """An adapter of a method on a model for a trial of its speed, with what will lie below it."""
    below, together = None, False
    for number, one in enumerate((*lower, Lower(method))):
        name = f"timed{number}"
        if isinstance(one.source, Path):
            below = load_adapter(model, one.source, name=name)
        else:
            own: Any = one.source
            own = own.stand_in() if hasattr(own, "stand_in") else own
            below = attach(model, own, name=name, seed=seed, on=below, together=together)
        together = one.trains
    assert below is not None
    return below


def lay_below(settings: Resolved, model: nn.Module, voice: Voice) -> Adapter | None:
    """The adapter that this run trains on top of, read, put on `model` and told of; None without
    one.

    Raises:
        AdapterFileError: there is none, or it was made for another base.
    """
    path = settings.run.on_adapter
    if path is None:
        return None
    folder = adapter_folder(Path(path)) or Path(path)
    below = load_adapter(model, folder, name=BELOW)
    kinds = ", then ".join(stage.method.kind for stage in below.stages)
    voice.say(f"below: {kinds} of {path}, which stays as it is")
    return below


def begin(settings: Resolved, model: nn.Module, below: Adapter | None = None) -> Begun:
    """An adapter that needs no records, on top of `below`, with what trains together with it."""
    together, seed = False, settings.train.seed
    for depth in range(len(settings.below), 0, -1):
        method = settings.below[-depth]
        name = f"{ADAPTER}{'.on' * depth}"  # as it will be when it is read from its files
        below = attach(model, method, name=name, seed=seed, on=below, together=together)
        together = True
    how: dict[str, Any] = {"name": ADAPTER, "seed": seed, "on": below, "together": together}
    return Begun(settings, attach(model, settings.method, **how))


def begin_by_records(
    settings: Resolved,
    model: nn.Module,
    task: Task,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    voice: Voice,
) -> Begun:
    """An adapter of which records decide something."""
    method = settings.method
    if not getattr(method, "candidates", ()):
        with voice.work("looking at records for what matters to the adapter"):
            how: dict[str, Any] = {"name": ADAPTER, "seed": settings.train.seed}
            adapter, relevance = attach_by_records(model, method, task, examples, **how)
        return Begun(settings, adapter, relevance)
    numbers = ", ".join(map(str, method.candidates))
    with voice.work(f"a trial of reinit_top_layers: {numbers}"):
        chosen, trial = choose_top_layers(model, method, task, examples, held_out, settings.train)
    settings = settings.decided("reinit_top_layers", chosen.reinit_top_layers, str(trial))
    voice.say(f"trial: reinit_top_layers: {trial.best}, {trial}")
    return Begun(settings, begin(settings, model).adapter, trial=trial)


def begun_on(
    settings: Resolved,
    model: nn.Module,
    task: Task,
    examples: Encoded,
    held_out: list[Example],
    voice: Voice,
    source: Path | None,
) -> Begun:
    """The adapter of a run, on its base and whatever lies below, from its start."""
    waits, below = waits_for_records(settings), lay_below(settings, model, voice)
    if waits:
        begun = begin_by_records(settings, model, task, examples, held_out, voice)
    else:
        begun = begin(settings, model, below)
    for line in begin_from(begun.adapter, source) if source is not None else ():
        voice.say(f"start: {line}")
    return begun
