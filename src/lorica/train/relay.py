"""Runs that hand adapters on to each other: the state of one adapter by itself.

    FOLDER/NAME/step-00000120/   a checkpoint as a run of this adapter alone would write it

An adapter's bits do not depend on its company, so whoever goes on from its state trains it to the
bits that it would have had where it was. The step in the name is the adapter's own, whatever turn
of a run that was. An evaluation that was made and not judged yet is part of the state.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from lorica.errors import CheckpointError, NonFiniteError
from lorica.tasks.task import Task
from lorica.train import checkpoint
from lorica.train.company import Company, Tell
from lorica.train.course import Course
from lorica.train.director import Evaluation
from lorica.train.identity import circumstances, identity


class Relay(Protocol):
    """What a run must know of others with which it shares adapters."""

    @property
    def states(self) -> Path:
        """The folder of the states, the same for all of them."""
        ...

    def leaving(self, working: Sequence[str]) -> Sequence[str]:
        """Asked before every turn: which of those that step in it leave this run instead.

        At least one adapter must stay in the run, whether it works or rests.
        """
        ...

    def left(self, name: str) -> None:
        """The state of an adapter is written, and this run knows it no more: it is to be detached,
        and another run may attach it and go on.
        """
        ...


@dataclass(frozen=True)
class Taken:
    """What was found of an adapter that goes on.

    Attributes:
        notes: what the user should be told.
        whole: whether there was a state to go on from; without one the adapter begins anew.
        unjudged: its newest step was not evaluated yet.
        resting: the evaluation that was not judged yet.
    """

    notes: Sequence[str]
    whole: bool = False
    unjudged: bool = False
    resting: Evaluation | None = None


class Passing:
    """What passes between a run and the others of its relay.

    Attributes:
        tokens: that the adapters of this run have seen in others, less what those who went there
            have seen here.
    """

    def __init__(self, relay: Relay, company: Company) -> None:
        self.relay, self.company, self.tokens = relay, company, 0
        keep = company.settings.save_total_limit
        self.states = AdapterStates(relay.states, company.model, company.task, keep=keep)

    def take_up(self, course: Course, turn: int, tell: Tell) -> bool:
        """Let a course that has not begun go on from its state, where there is one; whether its
        newest step is still to be evaluated.
        """
        taken = self.states.take_up(course)
        for note in taken.notes:
            tell("info" if taken.whole else "warning", note)
        if not taken.whole:
            return False
        course.joined, self.tokens = turn - course.step, self.tokens + course.tokens
        if taken.resting is not None:
            self.company.resting[course.name] = taken.resting
        return taken.unjudged

    def hand_on(self, tell: Tell) -> bool:
        """Let those go who are to leave; whether there were any."""
        company = self.company
        names = self.relay.leaving([course.name for course in company.working])
        for course in [c for c in company.courses if c.name in names]:
            self.states.save(course, unjudged=False, resting=None)
            company.courses[:] = [c for c in company.courses if c is not course]
            self.tokens -= course.tokens
            tell("info", f"{course.name} is handed on after step {course.step}")
            self.relay.left(course.name)
        return bool(names)

    def save(self, courses: Sequence[Course], unjudged: Collection[str]) -> list[str]:
        """Write the states of these adapters; what was written.

        Raises:
            NonFiniteError: of the first whose tensors are not finite; the others are written.
        """
        written, broken = [], None
        for course in courses:
            name, resting = course.name, self.company.resting.get(course.name)
            try:
                if self.states.save(course, unjudged=name in unjudged, resting=resting):
                    written.append(f"{name} (step {course.step})")
            except NonFiniteError as error:
                broken = broken or error
        if broken is not None:
            raise broken
        return written


class AdapterStates:
    """The states of the adapters of a run, in a folder that it shares with other runs.

    Args:
        keep: how many of one adapter stay; see `checkpoint.save`.
    """

    def __init__(self, folder: Path, model: nn.Module, task: Task, *, keep: int) -> None:
        self.folder, self.model, self.task, self.keep = folder, model, task, keep
        self._identity: dict[str, dict[str, str]] = {}
        self._written: dict[str, int] = {}

    def take_up(self, course: Course) -> Taken:
        """Let a course that has not begun go on from the newest state of its adapter, where there
        is one. States that are damaged, or those of something else, are set aside and told of.

        Raises:
            CheckpointError: the system cannot read it now, or another version of Lorica wrote it.
        """
        name, own = course.name, self.folder / course.name
        known = self._identity[name] = identity(self.model, self.task, [course], course.settings)
        self._written.pop(name, None)
        checkpoint.clean(own)
        try:
            state, notes = checkpoint.newest(own)
        except checkpoint.NoneWholeError as error:
            return self._set_aside(name, error)
        if state is None:
            return Taken([f"{name}: {note}" for note in notes])
        try:
            notes += checkpoint.check(state, known, self._circumstances(course))
        except CheckpointError as error:
            return self._set_aside(name, error)
        course.restore(state)
        self._written[name] = course.step
        found = state.counters[name].get("resting")
        resting = _evaluation(found) if found else None
        notes.append(f"going on from step {course.step}")
        return Taken([f"{name}: {note}" for note in notes], True, state.unjudged, resting)

    def _set_aside(self, name: str, error: CheckpointError) -> Taken:
        own = self.folder / name
        aside = own.with_name(f".bad-{name}-{secrets.token_hex(4)}")
        os.rename(own, aside)
        why = "; ".join([error.what, *error.problems[:2]])
        text = f"{name} begins anew, for its state is of no use: {why}; it is kept in {aside.name}"
        return Taken([text])

    def save(self, course: Course, *, unjudged: bool, resting: Evaluation | None) -> bool:
        """Write the state of an adapter; whether there was anything new.

        Raises:
            NonFiniteError: a tensor holds a NaN or an infinity, which no state shall keep.
            CheckpointError: it could not be written; earlier ones are untouched.
        """
        name = course.name
        if course.failed or not course.step or self._written.get(name) == course.step:
            return False
        now = self._circumstances(course)
        state = checkpoint.State(course.step, self._identity[name], now, unjudged=unjudged)
        course.save_into(state)
        if resting is not None:
            state.counters[name]["resting"] = asdict(replace(resting, beside=()))
        checkpoint.save(self.folder / name, state, keep=self.keep)
        self._written[name] = course.step
        return True

    def _circumstances(self, course: Course) -> dict[str, str]:
        return circumstances(self.model, course.settings)


def _evaluation(values: Mapping[str, Any]) -> Evaluation:
    """An evaluation from what JSON made of it."""
    made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Evaluation(**made)
