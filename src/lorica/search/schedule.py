"""When each candidate of a search joins and who goes on, where several processes train them.

The schedule is that of one process which trains `at_once` candidates together, a step of each in a
turn: a candidate that joined at turn j makes its step s at turn j + s, and when one ends the next
one joins at that turn. It is worked out from the study alone, so that it makes no difference who
trains what, in which order, how fast, and how often somebody is lost on the way:

- whoever has evaluated a candidate writes that down and asks to `advance`;
- the next turn at which anybody is evaluated is judged when all who are evaluated there have been
  heard; until then those who came early rest;
- so nobody's evaluation of a later turn is in the study when an earlier one is judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorica.search.entry import Entry
from lorica.search.space import SearchSettings
from lorica.search.study import Study
from lorica.search.verdict import verdict


@dataclass
class Schedule:
    """The schedule of a study. Only one process at a time may use one.

    Attributes:
        at_once: how many candidates train together, over all processes.
        every: steps between evaluations.
        total: steps of a candidate that trains to its end.
        rungs: steps at which candidates are compared.
    """

    study: Study
    at_once: int
    every: int
    total: int
    rungs: tuple[int, ...]

    def __post_init__(self) -> None:
        self._exhausted = False

    @property
    def how(self) -> SearchSettings:
        return self.study.space.how

    def advance(self) -> list[Entry]:
        """Judge and admit as far as what is known goes; all candidates as they are then."""
        self.study.look_again()
        while True:
            entries = self.study.entries()
            if self._settle(entries) or self._admit(entries):
                continue
            due = self.next_due(entries)
            if not due or any(not e.stopped and self._due(e) not in e.curve for e in due):
                return entries
            self._judge(due, entries)

    def next_due(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those who are heard at the next turn at which anybody is; empty where all have ended."""
        active = training(entries)
        turn = min(map(self.turn_of, active), default=0)
        return [entry for entry in active if self.turn_of(entry) == turn]

    def turn_of(self, entry: Entry) -> int:
        """The turn at which a candidate is next heard of."""
        return entry.stopped[0] if entry.stopped else (entry.joined or 0) + self._due(entry)

    def _due(self, entry: Entry) -> int:
        """The step at which a candidate is next judged."""
        done = max(entry.decided, default=0)
        return min((done // self.every + 1) * self.every, self.total)

    def _judge(self, due: Sequence[Entry], entries: Sequence[Entry]) -> None:
        found = {
            entry.number: verdict(
                entry,
                entries,
                self._due(entry),
                how=self.how,
                rungs=self.rungs,
                total=self.total,
                tokens=self.study.tokens,
            )
            for entry in due
            if not entry.stopped and self._due(entry) < self.total
        }
        for entry in due:
            if entry.stopped:
                outcome = "failed" if _is_failure(entry) else "finished"
                self.study.end(entry.number, outcome, reason=entry.stopped[1])
            else:
                self.study.decide(entry.number, self._due(entry), found.get(entry.number, ""))

    def _settle(self, entries: Sequence[Entry]) -> bool:
        """Make outcomes of what was decided; whether there was something to do."""
        acted = False
        for entry in training(entries):
            reason = next(filter(None, entry.decided.values()), "")
            if reason or self.total in entry.decided:
                self.study.end(entry.number, "cut" if reason else "finished", reason=reason)
                acted = True
        return acted

    def _admit(self, entries: Sequence[Entry]) -> bool:
        """Let the next candidate join where there is room; whether one did."""
        if self._exhausted or len(training(entries)) >= self.at_once:
            return False
        self._exhausted = self.study.admit(max(map(_ended_at, entries), default=0)) is None
        return not self._exhausted


def training(entries: Iterable[Entry]) -> list[Entry]:
    """Those who have joined and not ended, in the order in which they joined."""
    found = [e for e in entries if e.joined is not None and e.outcome == "training"]
    return sorted(found, key=lambda entry: (entry.joined, entry.number))


def _ended_at(entry: Entry) -> int:
    """The turn at which a candidate ended; 0 where it did not."""
    if entry.joined is None or entry.outcome in ("waiting", "training"):
        return 0
    return entry.stopped[0] if entry.stopped else entry.joined + max(entry.decided, default=0)


def _is_failure(entry: Entry) -> bool:
    """Whether what ended a candidate by itself makes it worthless: its numbers were not finite, or
    there is nothing by which it could be chosen.
    """
    assert entry.stopped is not None
    return "not finite" in entry.stopped[1] or entry.loss is None
