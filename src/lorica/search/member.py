"""One of several processes that train the candidates of a search: which it takes, when it waits.

A director of `train` around a `Field`, which attaches and reports. Who goes on is decided by the
`Schedule`, by whichever process has made it possible to. A process takes its share of those who
train and have nobody, be it that they are new, were handed on, or that their process is gone; where
it would only wait, it takes another one. With two more than another process it hands one on. What
was decided about a candidate stays decided, whoever goes on with it from its newest state.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorica.attach.attach import detach
from lorica.errors import ConfigError, TargetError
from lorica.records.crew import LOOK_EVERY, Crew
from lorica.records.folder import RunFolder
from lorica.search.entry import Entry
from lorica.search.field import Field, number_of
from lorica.search.schedule import Schedule, training
from lorica.train.director import LATER, Evaluation, Later, Newcomer


class Member:
    """Sends the candidates that this process takes into a run, and judges them with the others.

    Args:
        field: attaches candidates and reports evaluations.
        schedule: of all processes.
        crew: who has which candidate.
        folder: of this stretch of work.
        room: candidates that fit at once into the memory of this process; None where nobody knows.
    """

    def __init__(
        self,
        field: Field,
        schedule: Schedule,
        crew: Crew,
        folder: RunFolder,
        *,
        room: int | None = None,
    ) -> None:
        self.field, self.schedule, self.crew, self.folder = field, schedule, crew, folder
        share = crew.share(schedule.at_once)
        self._share = share if room is None else min(share, room)
        self._asked: dict[str, float] = {}
        self.study = schedule.study
        self._first: list[Newcomer] | None = None
        self._resting: set[str] = set()
        self._settled: set[str] = set()
        self._looked = 0.0
        self._judged, self._counted = False, 0.0

    @contextmanager
    def _alone(self) -> Iterator[list[Entry]]:
        with self.crew.locked():
            yield self.schedule.advance()

    # who joins

    def begin(self) -> bool:
        """Take the first candidates; whether there are any that can be attached."""
        self._first = self._join(0, idle=True)
        return bool(self._first)

    def newcomers(self, standing: Mapping[str, str | None]) -> Sequence[Newcomer]:
        """Candidates that this process takes now."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        ended = {name: why for name, why in standing.items() if why is not None}
        fresh = ended.keys() - self._settled - self._resting
        own = [name for name in standing if name not in ended]
        idle = all(name in self._resting for name in own)
        if not fresh and not idle and time.monotonic() - self._looked < LOOK_EVERY:
            return []
        self._looked = time.monotonic()
        if fresh:
            with self._alone() as entries:
                for name in fresh:
                    self._settle(by_number(entries)[number_of(name)], str(ended[name]))
            self._settled |= fresh
        return self._join(len(own), idle=idle)

    def again(self, name: str) -> Newcomer:
        """Never asked: a stretch of work has no checkpoints, only states of its candidates."""
        raise AssertionError(name)

    @property
    def state(self) -> dict[str, Any]:
        """Nothing: the study knows."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing is to be done."""

    def _join(self, number: int, *, idle: bool) -> list[Newcomer]:
        """Take candidates until there is one at least, or none to take."""
        while True:
            with self._alone() as entries:
                taken = self._taken(entries, number, idle=idle)
                self.crew.take([entry.name for entry in taken], self.folder)
            joined = [one for entry in taken if (one := self._attached(entry)) is not None]
            if joined or not taken:
                return joined

    def _taken(self, entries: Sequence[Entry], number: int, *, idle: bool) -> list[Entry]:
        # one beyond what fits where all others rest: they may rest until this one is judged
        owners, gone = self.crew.owners(), lost(self.crew, entries)
        free = [entry for entry in training(entries) if entry.name not in owners] + gone
        more = min(self._missing(entries, gone), self._share - number)
        return free[: max(more, int(idle))]

    def _missing(self, entries: Sequence[Entry], gone: Sequence[Entry]) -> int:
        """How many candidates more this process should have; below 0, how many fewer."""
        active = {entry.name for entry in (*training(entries), *gone)}
        return self.crew.balance(self.folder, active)

    def _attached(self, entry: Entry) -> Newcomer | None:
        try:
            return self.field.attached(entry)
        except (ConfigError, TargetError) as error:
            reason = self.field.refused(entry, error)
            with self.crew.locked():
                self.study.look_again()
                self.study.stop(entry.number, entry.joined or 0, reason)
            return None

    def _settle(self, entry: Entry, reason: str) -> None:
        """A candidate that trains no more: was that decided, or did it end by itself?"""
        if entry.outcome != "training" or entry.stopped:
            return
        turn = self.schedule.turn_of(entry)
        if "not finite" not in reason:  # it has ended with the evaluation that was judged last
            turn = (entry.joined or 0) + max(entry.decided, default=0)
        self.study.stop(entry.number, turn, reason)

    # who goes elsewhere

    @property
    def states(self) -> Path:
        """Where the states of candidates lie, for whoever goes on with them."""
        return self.crew.states

    def leaving(self, working: Sequence[str]) -> Sequence[str]:
        """Candidates that another process is to have, which has less to do: the newest ones. This
        is looked at when one was judged, and now and then.
        """
        now = time.monotonic()
        if not working or not (self._judged or now - self._counted >= LOOK_EVERY):
            return []
        self._judged, self._counted = False, now
        with self._alone() as entries:
            surplus = -self._missing(entries, lost(self.crew, entries))
        return working[-surplus:] if surplus > 0 else []

    def left(self, name: str) -> None:
        """A candidate whose state is written belongs to nobody."""
        detach(self.field.model, self.field.handles.pop(number_of(name)))
        with self.crew.locked():
            self.crew.release(name)

    # who goes on

    def judge(self, evaluation: Evaluation) -> str | Later | None:
        """Whether a candidate goes on after an evaluation, soon after that can be known: of one
        that rests the study is asked now and then, for it keeps the others out.
        """
        number, now = number_of(evaluation.name), time.monotonic()
        if evaluation.name in self._resting and now - self._asked[evaluation.name] < LOOK_EVERY:
            return LATER
        self._asked[evaluation.name] = now
        with self.crew.locked():
            self.study.look_again()
            known = by_number(self.study.entries())
            turn = min(map(self.schedule.turn_of, training(known.values())), default=0)
            for one in (evaluation, *evaluation.beside):
                if (known[number_of(one.name)].joined or 0) + one.step <= turn:
                    self.field.report(one)
            entry = by_number(self.schedule.advance())[number]
        reason = entry.decided.get(evaluation.step)
        if reason is None:
            self._resting.add(evaluation.name)
            return LATER
        self._resting.discard(evaluation.name)
        self._judged = True
        return reason or None


def by_number(entries: Iterable[Entry]) -> dict[int, Entry]:
    """The candidates of a study."""
    return {entry.number: entry for entry in entries}


def lost(crew: Crew, entries: Sequence[Entry]) -> list[Entry]:
    """Candidates of processes that are gone, and have not left their adapters."""
    owners = crew.owners()
    there = [e for e in entries if e.outcome in ("training", "finished", "cut")]
    return [entry for entry in there if crew.is_lost(entry.name, owners.get(entry.name))]
