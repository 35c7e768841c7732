"""A run with `adapters:`: several adapters that train together on one base, in one run folder.

output_dir/adapters/NAME/      each adapter, with its card and the tokenizer
output_dir/run.json            for each its data, its scores beside the base, why it ended or failed

Each has records, method and settings of its own, and trains to the same bits as in a run alone. One
whose numbers are not finite fails alone: the run goes on, says so, and ends with an error at last.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lorica import __version__
from lorica.attach.attach import Adapter, attach
from lorica.base.known import known
from lorica.cli.anchoring import anchored
from lorica.cli.encoding import encode, encoded_statement
from lorica.cli.judge import predictions, samples, tell_of_chance
from lorica.cli.manifest import manifest
from lorica.cli.material import Material, gather
from lorica.cli.prepare import load_base, size_line
from lorica.cli.prepared import Prepared
from lorica.cli.run import (
    Outcome,
    Signal,
    complete,
    dress,
    finished,
    resumable,
    signals_raise,
    stopped,
)
from lorica.cli.screening import check_effects, sight, tell
from lorica.cli.start import check_start, waits_for_records
from lorica.cli.voice import Voice
from lorica.config import Resolved
from lorica.data.screen import screen_quickly
from lorica.data.screen_tokens import screen_tokens
from lorica.errors import ConfigError, LoricaError, NonFiniteError
from lorica.files.transfer import begin_from
from lorica.records.atomic import write_file
from lorica.records.folder import RunFolder, json_text, now
from lorica.records.phrases import parameters
from lorica.records.read import read_manifest
from lorica.records.write import Recorder
from lorica.tasks.task import Prediction
from lorica.train.loop import train
from lorica.train.plan import courses_of
from lorica.train.report import TrainReport

_RECORDS = (
    *("data", "eval_data", "test_data", "columns", "format", "eval_size", "eval_records"),
    *("data_seed", "system"),
)
"""Settings that decide which records an adapter has: those that agree in them share the records."""


def execute_several(
    settings: Resolved,
    *,
    resume: Path | None,
    discard: bool,
    quiet: bool,
    json: bool,
    ignore_memory: bool,
) -> Outcome:
    """Train all adapters of the list at once, and judge each against the base.

    Args:
        resume: the folder to go on with.
        discard: throw away an earlier run in the output folder.
        quiet, json: how the display speaks.
        ignore_memory: as of one run; the memory of several is not estimated before they begin.

    Raises:
        LoricaError: as of one run, naming the adapter.
        NonFiniteError: adapters failed; the others are whole, scored and written.
    """
    began = time.monotonic()
    voice = Voice(json=json, quiet=quiet)
    if resume is not None and (outcome := finished(resume, settings, voice)):
        refuse_failed(resume)
        return outcome
    path = resume or Path(settings.run.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        with signals_raise(), ExitStack() as held:
            if resume:
                folder = held.enter_context(RunFolder.open(path))
            else:
                RunFolder.check(path, replace=discard)
            if settings.run.threads:
                torch.set_num_threads(settings.run.threads)
            several = prepare_several(settings, voice)
            if not resume:
                folder = held.enter_context(RunFolder.create(path, replace=discard))
            return SeveralRun(several, folder, voice, began).go(resume=resume is not None)
    except Signal as asked:
        voice.display.work(None)
        raise stopped(path, asked.number) from None


@dataclass
class Several:
    """What `SeveralRun` needs: the settings of the run, and what is prepared for each adapter."""

    settings: Resolved
    parts: dict[str, Prepared]

    @property
    def first(self) -> Prepared:
        return next(iter(self.parts.values()))


def check_several(settings: Resolved) -> None:
    """What can be told of the adapters of a run before anything is read.

    Raises:
        ConfigError: an adapter that cannot train beside others from one file.
    """
    problems = []
    for name, own in settings.adapters.items():
        check_start(own)
        where = f"{own.origins['method']}: adapter {name!r}"
        if own.below:
            problems.append(f"{where}: its method is a list, and such adapters train by themselves")
        elif waits_for_records(own) or getattr(own.method, "needs_records", False):
            problems.append(f"{where}: records decide about its start, for which it must be alone")
    if problems:
        raise ConfigError(
            "these adapters cannot train together from one file",
            problems=problems,
            mend="train those in runs of their own",
        )


def prepare_several(settings: Resolved, voice: Voice) -> Several:
    """Read the records of all, load the base once, attach and encode; writes nothing."""
    check_several(settings)
    for note in settings.notes:
        voice.say(note)
    materials = _materials(settings, voice)
    name, first = next(iter(settings.adapters.items()))
    kind = _kind(settings, materials)
    with voice.work(f"loading {settings.run.model}"):
        model, loaded = load_base(first, materials[name], kind)
    whole = tuple(loaded.method.modules_to_save or ())
    number = sum(p.numel() for p in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    voice.say(
        f"base: {type(model).__name__}, {parameters(number)} parameters in {dtype}, for {kind}"
    )
    for note in known(model).notes:
        voice.say(f"base: {note}")
    parts = {}
    for name, own in settings.adapters.items():
        if new := [w for w in whole if w not in (own.method.modules_to_save or ())]:
            given = [*(own.method.modules_to_save or ()), *new]
            own = own.decided("modules_to_save", given, "the base has no weights for them")
        with _about(name, own):
            parts[name] = _prepared(name, own, materials[name], model, voice)
    _agree_on_length(parts, model, voice)
    _check_facts(parts)
    courses_of(model, next(iter(parts.values())).task, *data_of(parts))  # refuses early
    for name, part in parts.items():
        voice.say(f"{name}: {part.adapter.reason}")
        voice.say(f"{name}: {size_line(part.adapter, number)}")
        voice.say(f"{name}: {encoded_statement(part.task, part.examples)}")
        tell(
            screen_tokens(sight(part.settings, part.material, model, part.examples)),
            part.settings,
            voice,
        )
    return Several(anchored(settings), parts)


def _materials(settings: Resolved, voice: Voice) -> dict[str, Material]:
    """The records of each adapter; read once for those that share them."""
    found: dict[str, Material] = {}
    made: dict[tuple, Material] = {}
    for name, own in settings.adapters.items():
        key = tuple(str(getattr(own.run, key)) for key in _RECORDS)
        if key not in made:
            with _about(name, own), voice.work(f"reading the data of {name}"):
                material = made[key] = gather(own.run, seed=own.data_seed)
            for line in material.statements:
                voice.say(f"{name}: {line}")
            held_out = {id(part): part for part in (material.valid, material.scored) if part}
            with _about(name, own):
                tell(screen_quickly(material.train, [*held_out.values()]), own, voice)
        found[name] = made[key]
    return found


def _kind(settings: Resolved, materials: Mapping[str, Material]) -> str:
    """The task of all.

    Raises:
        ConfigError: the records of one adapter are for another task, or have other classes.
    """
    kinds, labels = {}, {}
    for name, own in settings.adapters.items():
        with _about(name, own):
            kinds[name] = materials[name].task(own.run.task, own.run.model)
            check_effects(own, materials[name], kinds[name])
        if kinds[name] == "text-classification":
            labels[name] = materials[name].labels
    for what, found in (("task", kinds), ("classes", labels)):
        if len(set(found.values())) > 1:
            raise ConfigError(
                f"adapters that train together need one {what}",
                problems=[f"adapter {name!r}: {value}" for name, value in found.items()],
                mend="train them in runs of their own",
            )
    return next(iter(kinds.values()))


@contextmanager
def _about(name: str, own: Resolved) -> Iterator[None]:
    """Say of an error which adapter it is about, and where that stands."""
    try:
        yield
    except LoricaError as error:
        who = f"adapter {name!r}"
        places = (own.origins.get(key, "") for key in ("data", *own.origins))
        where = next((place for place in places if who in place), who)
        error.what = f"{where}: {error.what}"
        raise


def _prepared(
    name: str, own: Resolved, material: Material, model: torch.nn.Module, voice: Voice
) -> Prepared:
    """One adapter, attached, with its records as numbers."""
    adapter, told = attached(name, own, model)
    task, examples, held_out, own = encode(own, material, model, voice)
    for line in told:
        voice.say(f"{name}: {line}")
    metrics = list(own.run.metrics or material.metrics(task.kind))
    return Prepared(own, material, model, adapter, task, examples, held_out, metrics)


def attached(name: str, own: Resolved, model: torch.nn.Module) -> tuple[Adapter, Sequence[str]]:
    """An adapter as its training begins, and what is to be told of that."""
    source = check_start(own)
    adapter = attach(model, own.method, name=name, seed=own.train.seed)
    return adapter, begin_from(adapter, source) if source is not None else ()


def _agree_on_length(parts: dict[str, Prepared], model: torch.nn.Module, voice: Voice) -> None:
    """Where the records of one adapter must be cut, the same length holds for all."""
    limits = {part.settings.train.max_length for part in parts.values()}
    if len(limits) < 2:
        return
    most = min(limit for limit in limits if limit is not None)
    for name, part in parts.items():
        if part.settings.train.max_length != most:
            own = part.settings.decided("max_length", most, "that of the adapters beside it")
            task, examples, held_out, own = encode(own, part.material, model, voice)
            parts[name] = replace(
                part, settings=own, task=task, examples=examples, held_out=held_out
            )


def _check_facts(parts: Mapping[str, Prepared]) -> None:
    """Raises ConfigError where the adapters would be asked in different ways."""
    facts = {name: part.task.facts() for name, part in parts.items()}
    first = next(iter(facts))
    problems = [
        f"{key} is {facts[first][key]!r} for {first!r} and {value!r} for {name!r}"
        for name, own in facts.items()
        for key, value in own.items()
        if facts[first].get(key) != value
    ]
    if problems:
        raise ConfigError(
            "adapters that train together must be asked in one way",
            problems=problems,
            mend="set it beside the list of adapters, such as separator, or train them apart",
        )


def data_of(parts: Mapping[str, Prepared]) -> tuple[dict, dict, dict]:
    """Records, evaluation records and settings by adapter, as `train` takes them."""
    return (
        {part.adapter: part.examples for part in parts.values()},
        {part.adapter: part.held_out for part in parts.values()},
        {part.adapter: part.settings.train for part in parts.values()},
    )


def about(parts: Mapping[str, Prepared], path: Path) -> dict[str, Any]:
    """What run.json says of the records of these adapters."""
    whole = manifest(next(iter(parts.values())), path)
    if len({id(part.material) for part in parts.values()}) > 1:
        del whole["data"]  # each adapter says its own
    return whole


def begin(folder: RunFolder, settings: Resolved) -> None:
    """What makes a folder a run."""
    write_file(folder.config, settings.to_yaml())
    head = {"lorica": __version__, "status": "running", "started": now()}
    write_file(folder.manifest, json_text({**head, "run": {"path": str(folder.path)}}))


@dataclass
class SeveralRun:
    """A run whose folder is held."""

    several: Several
    folder: RunFolder
    voice: Voice
    began: float
    recorder: Recorder | None = None
    shown: list[dict] = field(default_factory=list)

    def go(self, *, resume: bool) -> Outcome:
        """Train, then score base and adapters, compare, report."""
        if not resume:
            begin(self.folder, self.several.settings)
        return self.end(self._train(resume))

    def end(self, report: TrainReport) -> Outcome:
        """What comes after the training."""
        with resumable(self.folder, self.voice, lambda: self.recorder):
            scores = self._judge(report)
            self.folder.write_samples(self.shown)
            for name in report.folders:
                complete(self.several.parts[name], self.folder.adapter(name))
        self._finish(scores, report)
        refuse_failed(self.folder.path)
        return Outcome(self.folder.path, {}, self.shown)

    def _train(self, resume: bool) -> TrainReport:
        first = self.several.first

        def recorder(step: int | None) -> Recorder:
            config = self.several.settings.to_yaml()
            self.recorder = self.voice.recorder(self.folder, config, step)
            return self.recorder

        data, eval_data, settings = data_of(self.several.parts)
        return train(
            first.model,
            data,
            settings,
            output_dir=self.folder,
            eval_data=eval_data,
            task=first.task,
            recorder=recorder,
            manifest=about(self.several.parts, self.folder.path),
            resume=resume,
        )

    def _judge(self, report: TrainReport) -> dict[str, dict[str, Any]]:
        """Scores of each adapter beside the base, which is asked once for the same records."""
        from lorica.evaluate.compare import compare

        asked: dict[int, list[Prediction]] = {}
        scores: dict[str, dict[str, Any]] = {}
        for name in report.folders:
            part = self.several.parts[name]
            key = id(part.material)
            if key not in asked:
                asked[key] = self._ask(part, tuned=False)
                tell_of_chance(part.base, self.voice)
            before, after = asked[key], self._ask(part, tuned=True)
            found = compare(before, after, part.metrics) if before else {}
            scores[name] = {metric: asdict(one) for metric, one in found.items()}
            shown = samples(before, after, part.task, part.settings.run.num_samples)
            self.shown += [{"adapter": name, **sample} for sample in shown]
        return scores

    def _ask(self, part: Prepared, *, tuned: bool) -> list[Prediction]:
        return predictions(
            part.model,
            part.adapter if tuned else None,
            part.task,
            part.material.test,
            self.voice,
            generate=part.material.generates,
        )

    def _finish(self, scores: dict[str, dict[str, Any]], report: TrainReport) -> None:
        outcome = report.outcome()
        for name, part in self.several.parts.items():
            entry = outcome["adapters"][name]
            entry["data"] = manifest(part, self.folder.path)["data"]
            entry["scores"] = scores.get(name, {})
            if report.failed.get(name):
                entry["failed"] = report.failed[name]
        total = {"total_seconds": time.monotonic() - self.began}
        summary = {
            **outcome,
            "status": "finished",
            "resources": {**report.resources, **total},
        }
        assert self.voice.writer is not None
        self.voice.writer.finish(summary)
        dress(self.folder.path)
        self.voice.display.finish(summary)


def refuse_failed(path: Path) -> None:
    """Raises NonFiniteError for a finished run of which adapters failed, whenever that was."""
    ended = read_manifest(path / "run.json").get("training", {}).get("failed", {})
    if failed := [why for why in ended.values() if why]:
        raise NonFiniteError(
            f"{len(failed)} of {len(ended)} adapters failed; the others are in {path}",
            problems=failed,
            mend="lower their learning_rate, or set max_grad_norm, in a run of their own",
        )


def closing_lines_of_several(folder: Path) -> list[str]:
    """The end of a run: where the results lie, and what to type next."""
    names = list(read_manifest(folder / "run.json").get("adapters", {}))
    first = shlex.quote(str(folder / "adapters" / names[0]))
    return [
        "",
        *(f"adapter  {folder / 'adapters' / name}" for name in names),
        f"report   {folder / 'report.html'}",
        f"next     lorica chat {first}",
        f"         lorica eval {first} --data FILE",
    ]
