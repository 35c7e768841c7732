"""The study: every candidate of a search with what it reached, in a database that survives a kill.

It is a study of Optuna, so that its tools read it, and several machines may work on one. Each of
them (a "run") claims candidates, and what was decided about a candidate is written down before it
is acted on: a run that is gone on with from a checkpoint finds its own decisions here and takes
them again, whatever others have reached meanwhile.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from lorica.errors import ConfigError, LoricaError, MissingPackage
from lorica.search.entry import Entry, Outcome, entry_of
from lorica.search.samplers import FIXED, fixed_points, number_of, suggested
from lorica.search.space import Choices, Point, Space

NAME = "lorica"
"""Of the study in its database, where an address names none."""

_LOST = timedelta(seconds=60)
"""A candidate that somebody took this long ago and never put a name to is free again."""

_SAMPLERS = {"tpe": "TPESampler", "gp": "GPSampler", "qmc": "QMCSampler"}


class Study:
    """A study in its database.

    Args:
        storage: a file, or an address that Optuna takes (sqlite:///..., mysql://...).
        space: what may be chosen.
        seed: of the sampler.
        identity: what must be the same for all who work on this study.
        run: the folder of this run, by which it claims candidates.

    Raises:
        ConfigError: the study there is one of other settings, data or base.
        MissingPackage: optuna is not there.
    """

    def __init__(
        self, storage: str, space: Space, *, seed: int, identity: Mapping[str, Any], run: str
    ) -> None:
        self.space, self.run = space, run
        optuna = self._optuna = import_optuna()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._shared = "://" in storage or space.how.storage is not None
        url = storage if "://" in storage else f"sqlite:///{Path(storage).absolute()}"
        how = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        self._storage = optuna.storages.RDBStorage(url, engine_kwargs=how)
        self._study = self._open(seed, dict(identity))
        self._own: dict[int, _Held] = {}
        self._tokens: tuple[int, ...] | None = None

    def _open(self, seed: int, identity: dict[str, Any]) -> Any:
        optuna = self._optuna
        how: dict[str, Any] = {"study_name": NAME, "storage": self._storage}
        sampler = _sampler(optuna, self.space.sampler, seed)
        try:
            study = optuna.create_study(**how, sampler=sampler, direction="minimize")
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(**how, sampler=sampler)
        found = study.user_attrs.get("identity")
        if found is None:  # new, or killed before it was whole: the points are the same again
            for point in _missing(study, fixed_points(self.space, seed)):
                study.enqueue_trial(_params(self.space, point), user_attrs={"point": point})
            study.set_user_attr("identity", identity)
        elif found != identity:
            _refuse(found, identity)
        return study

    def close(self) -> None:
        """Leave the database to others."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    # reading

    def entries(self) -> list[Entry]:
        """All candidates, by number."""
        return [entry_of(trial) for trial in self._trials()]

    def entry(self, number: int) -> Entry:
        return next(entry for entry in self.entries() if entry.number == number)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Trained tokens of each evaluation record; empty before the first evaluation."""
        return tuple(self._study.user_attrs.get("tokens", ()))

    def _trials(self) -> list[Any]:
        found = self._study.get_trials(deepcopy=False)
        return [trial for trial in found if not trial.user_attrs.get("void")]

    # claiming

    def claim(self) -> Entry | None:
        """The next candidate, which is this run's from now on; None where there are no more."""
        orphan = self._orphan()
        number = self._asked() if orphan is None else orphan
        if number is None:
            return None
        self._set(number, run=self.run)
        return self.entry(number)

    def admit(self, turn: int) -> Entry | None:
        """The next candidate, which joins the search of this run at this turn, whichever process
        trains it; None where there are no more.
        """
        orphan = self._orphan()
        number = self._asked() if orphan is None else orphan
        if number is None:
            return None
        self._set(number, joined=turn, run=self.run)
        return self.entry(number)

    def _asked(self) -> int | None:
        """A candidate from the sampler, or the queue."""
        fixed = self.space.sampler in FIXED
        if not fixed and len(self._trials()) >= number_of(self.space):
            return None
        if fixed and not any(t.state.name == "WAITING" for t in self._trials()):
            return None
        trial = self._study.ask()
        if fixed and "point" not in trial.user_attrs:  # another machine took the last one
            trial.set_user_attr("void", True)
            self._study.tell(trial, state=self._state("FAIL"))
            return None
        point = suggested(self.space, trial, trial.user_attrs.get("point"))
        if not fixed:
            trial.set_user_attr("point", point)
        return trial.number

    def _orphan(self) -> int | None:
        """A candidate that was taken by a run which was killed before it could say so."""
        for trial in self._trials():
            known = trial.user_attrs
            if trial.state.name != "RUNNING" or known.get("run"):
                continue
            since = datetime.now() - (trial.datetime_start or datetime.now())
            if "point" in known and (not self._shared or since > _LOST):
                return trial.number
        return None

    def own(self) -> list[Entry]:
        """The candidates of this run, whatever became of them."""
        return [entry for entry in self.entries() if entry.run == self.run]

    # writing

    def describe(self, number: int, *, parameters: int, rank: int | None) -> None:
        """Say how large a candidate is."""
        self._set(number, parameters=parameters, rank=rank)

    def report(
        self,
        number: int,
        step: int,
        loss: float,
        *,
        losses: Sequence[float],
        tokens: Sequence[int],
        kept: bool,
        rung: bool,
    ) -> None:
        """Take an evaluation. The same one again changes nothing.

        Args:
            losses, tokens: summed loss and trained tokens of each evaluation record.
            kept: whether the adapter of this step is the one that would be kept.
            rung: whether candidates are compared at this step.

        Raises:
            LoricaError: the records are others than those of the other candidates.
        """
        if self._tokens is None and (found := self.tokens):
            self._tokens = found
        if self._tokens is None:
            self._study.set_user_attr("tokens", list(tokens))
            self._tokens = tuple(tokens)
        if self._tokens != tuple(tokens):
            raise LoricaError("the candidates of this study were judged on different records")
        held = self._held_of(number)
        if step in held.steps or held.ended:
            return
        rounded = [float(f"{value:.7g}") for value in losses]
        self._set(number, newest=rounded)
        if kept:
            self._set(number, kept={"step": step, "losses": rounded})
        if rung:
            self._set(number, **{f"rung {step}": rounded})
        self._storage.set_trial_intermediate_value(held.trial, step, loss)  # last: all is there
        held.steps.add(step)

    def decision(self, number: int, step: int) -> str | None:
        """What was decided about a candidate of this run at a step: "" for going on, else why it
        ends; None where nothing was.
        """
        return self._held_of(number).known.get(f"decided {step}")

    def decide(self, number: int, step: int, reason: str) -> None:
        """Write down what `decision` then gives."""
        self._set(number, **{f"decided {step}": reason})

    def stop(self, number: int, turn: int, reason: str) -> None:
        """Write down that a candidate ended by itself; the schedule makes an outcome of it."""
        self._set(number, stopped=[turn, reason])

    def agree(self, key: str, value: Any) -> Any:
        """What the first one to ask for it has said; the others take that."""
        found = self._study.user_attrs.get(key)
        if found is None:
            self._study.set_user_attr(key, value)
        return value if found is None else found

    def look_again(self) -> None:
        """Others may have written about any candidate meanwhile."""
        self._own.clear()

    def end(self, number: int, outcome: Outcome, *, reason: str = "") -> None:
        """Write down what became of a candidate. The same again changes nothing."""
        held = self._held_of(number)
        if held.ended:
            return
        self._set(number, reason=reason)
        entry = self.entry(number)
        if outcome == "failed" or entry.loss is None:
            self._study.tell(number, state=self._state("FAIL"))
        elif outcome == "cut":
            self._study.tell(number, state=self._state("PRUNED"))
        else:
            self._study.tell(number, entry.loss)
        held.ended = True

    def _state(self, name: str) -> Any:
        return self._optuna.trial.TrialState[name]

    def _held_of(self, number: int) -> _Held:
        """A candidate as this process knows it: nobody else writes about it."""
        if number not in self._own:
            trial = next(trial for trial in self._trials() if trial.number == number)
            steps, ended = set(trial.intermediate_values), trial.state.is_finished()
            self._own[number] = _Held(trial._trial_id, dict(trial.user_attrs), steps, ended)
        return self._own[number]

    def _set(self, number: int, **values: Any) -> None:
        """Write attributes, where they change and the candidate has not ended."""
        held = self._held_of(number)
        for key, value in values.items():
            if not held.ended and held.known.get(key, _NOTHING) != value:
                self._storage.set_trial_user_attr(held.trial, key, value)
                held.known[key] = value


@dataclass
class _Held:
    """A candidate of this run: its key in the database, and what is written there."""

    trial: int
    known: dict[str, Any]
    steps: set[int]
    ended: bool


_NOTHING = object()


def import_optuna() -> Any:
    """The package that keeps a study. Raises MissingPackage where it is not there."""
    try:
        import optuna
    except ImportError as error:
        raise MissingPackage.of("optuna", "search", "a search") from error
    return optuna


def _sampler(optuna: Any, kind: str, seed: int) -> Any:
    if kind not in _SAMPLERS:
        return optuna.samplers.RandomSampler(seed=seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return getattr(optuna.samplers, _SAMPLERS[kind])(seed=seed)
    except ImportError as error:
        raise ConfigError(
            f"sampler: {kind} cannot be used: {error}", mend="choose tpe or random"
        ) from error


def _missing(study: Any, points: Sequence[Point] | None) -> list[Point]:
    """The points that are not in the queue yet."""
    there = [json.dumps(trial.user_attrs.get("point")) for trial in study.get_trials()]
    return [point for point in points or () if json.dumps(point) not in there]


def _params(space: Space, point: Point) -> dict[str, Any]:
    """A point as Optuna names its parameters."""
    found = {}
    for axis in space.axes:
        if axis.key in point and isinstance(axis, Choices):
            found[axis.key] = axis.labels[axis.values.index(point[axis.key])]
        elif axis.key in point:
            found[axis.key] = point[axis.key]
    return found


def _refuse(found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises ConfigError for a study of something else."""
    keys = sorted({*found, *identity})
    problems = [
        f"{key} is {_text(identity.get(key))}, and the study has {_text(found.get(key))}"
        for key in keys
        if found.get(key) != identity.get(key)
    ]
    raise ConfigError(
        "the study there is one of another search",
        problems=problems,
        mend="choose another output_dir, or another storage",
    )


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
