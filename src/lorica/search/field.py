"""The candidates of a search in training: who joins, who is cut, and what the study is told.

A director of `train` (see `train.director`) whose memory is the study. Whatever it decides is
written there before it is acted on, so that it needs no state of its own in a checkpoint: a run
that goes on from an older checkpoint hears its evaluations again, finds what it had decided, and
decides the same. Candidates are bitwise what they would be alone, so that a repeated stretch brings
the same evaluations too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorica.attach.attach import attach
from lorica.attach.handle import Adapter
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.errors import ConfigError, TargetError
from lorica.files.transfer import begin_from
from lorica.methods.method import Method, is_chosen
from lorica.search.entry import Entry, adapter_name
from lorica.search.space import Point, name_of
from lorica.search.study import Study
from lorica.search.verdict import verdict
from lorica.tasks.task import Task
from lorica.train.director import Evaluation, Newcomer
from lorica.train.starts import attach_by_records

Tell = Callable[[str, str], None]
"""Takes an event: its kind ("info", "warning") and its text."""

SettingsOf = Callable[[Point], tuple[Method, TrainSettings]]
"""A candidate's settings; raises ConfigError for a point that has none."""


@dataclass(frozen=True)
class Course:
    """What all candidates have in common.

    Attributes:
        examples, held_out: training and evaluation records, encoded.
        total: optimizer steps of a candidate that trains to its end.
        rungs: steps at which candidates are compared.
        at_once: how many train together.
        keeps_best: whether the adapter of the best evaluation is kept, and not the last one.
    """

    examples: Sequence[Example]
    held_out: Sequence[Example]
    total: int
    rungs: tuple[int, ...]
    at_once: int
    keeps_best: bool = True


class Field:
    """Sends the candidates of a study into a run and judges them.

    Args:
        model: the base.
        study: which hears of everything.
        course: what they have in common.
        settings_of: makes the settings of a candidate.
        seed: of every adapter's start, the same for all.
        task: what a loss is, for a start that records decide.
        tell: is told what happens, a line each.
        source: the adapter folder whose tensors every candidate begins with.
    """

    def __init__(
        self,
        model: nn.Module,
        study: Study,
        course: Course,
        settings_of: SettingsOf,
        *,
        seed: int,
        task: Task,
        tell: Tell = lambda kind, text: None,
        source: Path | None = None,
    ) -> None:
        self.model, self.study, self.course, self.source = model, study, course, source
        self.settings_of, self.seed, self.task, self.tell = settings_of, seed, task, tell
        self.handles: dict[int, Adapter] = {}
        self._settled: set[str] = set()
        self._heard: set[tuple[str, int]] = set()
        self._entries: Sequence[Entry] = ()
        self._exhausted = False

    # who joins

    def newcomers(self, standing: Mapping[str, str | None]) -> Sequence[Newcomer]:
        """The next candidates, as many as there is room for."""
        for name, reason in standing.items():
            if reason is not None and name not in self._settled:
                self._settled.add(name)
                self._settle(number_of(name), reason)
        free = self.course.at_once - sum(reason is None for reason in standing.values())
        joined: list[Newcomer] = []
        while len(joined) < free and not self._exhausted:
            present = {*standing, *(one.adapter.name for one in joined)}
            entry = self._next(present)
            if entry is None:
                self._exhausted = True
            elif (newcomer := self._attached(entry)) is not None:
                joined.append(newcomer)
        return joined

    def again(self, name: str) -> Newcomer:
        """A candidate that was in the run when its checkpoint was written."""
        found = self._attached(self.study.entry(number_of(name)))
        if found is None:
            raise ConfigError(
                f"the candidate {name} cannot be attached any more",
                mend="resume with the base and the settings that the search began with",
            )
        return found

    @property
    def state(self) -> dict[str, Any]:
        """Nothing: the study knows."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing is to be done."""

    def _next(self, present: set[str]) -> Entry | None:
        """A candidate of this run that the run does not hold (it was killed), or a new one."""
        for entry in self.study.own():
            if entry.name not in present and entry.outcome in ("training", "finished"):
                return entry
        return self.study.claim()

    def _attached(self, entry: Entry) -> Newcomer | None:
        """The adapter of a candidate; None, with a word, where there can be none."""
        try:
            return self.attached(entry)
        except (ConfigError, TargetError) as error:
            self.study.end(entry.number, "failed", reason=self.refused(entry, error))
            return None

    def refused(self, entry: Entry, error: ConfigError | TargetError) -> str:
        """Tells why a candidate cannot be trained; the reason in a line."""
        reason = "; ".join([error.what, *error.problems[:2]])
        self.tell("warning", f"{entry.name} ({name_of(entry.point)}) cannot be trained: {reason}")
        return reason

    def attached(self, entry: Entry) -> Newcomer:
        """The adapter of a candidate on the base. Raises ConfigError, TargetError."""
        method, settings = self.settings_of(entry.point)
        adapter = self._attach(method, entry.name)
        self.handles[entry.number] = adapter
        rank = getattr(adapter.method, "r", None)
        if entry.parameters is None:
            self.study.describe(entry.number, parameters=adapter.num_parameters, rank=rank)
        return Newcomer(adapter, self.course.examples, settings, self.course.held_out)

    def _attach(self, method: Method, name: str) -> Adapter:
        how: dict[str, Any] = {"name": name, "seed": self.seed}
        if not is_chosen(method):
            adapter = attach(self.model, method, **how)
            if self.source is not None:
                notes = begin_from(adapter, self.source, partly=True)
                for note in [] if self.handles else notes:  # the same for all
                    self.tell("info", f"start: {note}")
            return adapter
        records = self.course.examples
        return attach_by_records(self.model, method, self.task, records, **how)[0]

    def _settle(self, number: int, reason: str) -> None:
        """What became of a candidate that trains no more. One whose numbers were not finite has
        failed, whatever it had reached before; one that ended itself by its patience has finished.
        """
        entry = self.study.entry(number)
        if entry.outcome != "training":
            return
        if "not finite" in reason or entry.loss is None:
            self.study.end(number, "failed", reason=reason)
        else:
            self.study.end(number, "finished", reason=reason)

    # who goes on

    def judge(self, evaluation: Evaluation) -> str | None:
        """Whether a candidate goes on after an evaluation."""
        self._hear((*evaluation.beside, evaluation))
        number, step = number_of(evaluation.name), evaluation.step
        if step >= evaluation.total:
            self.study.end(number, "finished")
            return None
        reason = self.study.decision(number, step)
        if reason is None:
            reason = self._decide(number, step)
            self.study.decide(number, step, reason)
        if reason:
            self.study.end(number, "cut", reason=reason)
        return reason or None

    def _hear(self, evaluations: Sequence[Evaluation]) -> None:
        """Tell the study of the evaluations of a turn, once."""
        fresh = [one for one in evaluations if (one.name, one.step) not in self._heard]
        for one in fresh:
            self.report(one)
            self._heard.add((one.name, one.step))
        if fresh:
            self._entries = self.study.entries()

    def report(self, evaluation: Evaluation) -> None:
        """Tell the study of an evaluation; the same again changes nothing."""
        losses, tokens = by_record(evaluation.losses, evaluation.tokens, evaluation.rows)
        self.study.report(
            number_of(evaluation.name),
            evaluation.step,
            evaluation.scores["eval_loss"],
            losses=losses,
            tokens=tokens,
            kept=evaluation.best or not self.course.keeps_best,
            rung=evaluation.step in self.course.rungs,
        )

    def _decide(self, number: int, step: int) -> str:
        """Why a candidate ends after an evaluation; empty where it goes on."""
        entries = self._entries
        return verdict(
            next(entry for entry in entries if entry.number == number),
            entries,
            step,
            how=self.study.space.how,
            rungs=self.course.rungs,
            total=self.course.total,
            tokens=self.study.tokens,
            decided=self._decided,
        )

    def _decided(self, entry: Entry, step: int) -> str | None:
        """What was decided about a candidate; of this run's own, maybe in this very turn."""
        if entry.number in self.handles:
            return self.study.decision(entry.number, step)
        return entry.decided.get(step)


def number_of(name: str) -> int:
    """The candidate whose adapter has this name."""
    number = int(name.removeprefix("c"))
    assert adapter_name(number) == name
    return number


def by_record(
    losses: Sequence[float], tokens: Sequence[int], rows: Sequence[int]
) -> tuple[list[float], list[int]]:
    """Sums over the examples of each record: a long text makes several examples, which are no
    independent draws.

    Args:
        losses, tokens: summed loss and trained tokens of each example.
        rows: the record of each.
    """
    of_losses: dict[int, float] = {}
    of_tokens: dict[int, int] = {}
    for loss, number, row in zip(losses, tokens, rows, strict=True):
        of_losses[row] = of_losses.get(row, 0.0) + loss
        of_tokens[row] = of_tokens.get(row, 0) + number
    return list(of_losses.values()), list(of_tokens.values())
