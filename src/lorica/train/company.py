"""The adapters of a run: who trains, who has ended and why, who joins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from lorica.config import TrainSettings
from lorica.errors import CheckpointError, ConfigError, NonFiniteError
from lorica.tasks.task import Task
from lorica.train.agreement import check_agreement
from lorica.train.checkpoint import State
from lorica.train.course import Course
from lorica.train.director import Director, Evaluation, Later, Newcomer
from lorica.train.plan import courses_of
from lorica.train.reuse import Reuse

Tell = Callable[[str, str], None]
"""Takes an event: its kind and its text."""


class Company:
    """The courses of a run, in the order in which they joined.

    Attributes:
        courses: all, also those that have ended.
        director: decides who leaves and joins; None where nobody does.
        heard: the evaluations of the newest turn that had some.
        resting: name -> the evaluation that the director has not judged yet.
        asked: whether the director was asked for newcomers since the last turn.
        errors: what ended those that failed since the run was begun or gone on with.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        courses: list[Course],
        settings: TrainSettings,
        director: Director | None,
        reuse: Reuse,
    ) -> None:
        self.model, self.task, self.courses, self.settings = model, task, courses, settings
        self.director, self.reuse, self.asked = director, reuse, False
        self.heard: dict[str, Evaluation] = {}
        self.resting: dict[str, Evaluation] = {}
        self.errors: dict[str, NonFiniteError] = {}

    @property
    def alone(self) -> bool:
        """Whether this is a run of one adapter, which fails with it."""
        return self.director is None and len(self.courses) == 1

    @property
    def working(self) -> list[Course]:
        """Those who step in the turn to come."""
        return [c for c in self.courses if not c.done and c.name not in self.resting]

    @property
    def done(self) -> bool:
        """Whether nobody trains any more."""
        return not self.resting and all(course.done for course in self.courses)

    def fail(self, course: Course, error: NonFiniteError, tell: Tell) -> None:
        """End one adapter whose numbers are not finite; the others go on.

        Raises:
            NonFiniteError: no other is there, or all have failed and nobody can join.
        """
        if self.alone:
            raise error
        course.failed, self.errors[course.name] = str(error).splitlines()[0], error
        tell("warning", f"{course.failed}; it ends here, and the others go on")
        if self.director is None:
            self.refuse_if_all_failed()

    def refuse_if_all_failed(self) -> None:
        """Raises NonFiniteError where no adapter came through."""
        failed = [course for course in self.courses if course.failed]
        if len(failed) == len(self.courses):
            all_of_them = NonFiniteError(
                f"all {len(failed)} adapters failed",
                problems=[self._told(course) for course in failed],
                mend="lower learning_rate, set max_grad_norm, or use dtype: float32",
            )
            all_of_them.failed = {course.name: course.failed or "" for course in failed}
            all_of_them.steps = {course.name: course.step for course in failed}
            if self.errors:
                first = next(iter(self.errors.values()))
                all_of_them.rows, all_of_them.adapter = first.rows, first.adapter
            raise all_of_them

    def _told(self, course: Course) -> str:
        """What ended an adapter, with its numbers and records where they are known."""
        error = self.errors.get(course.name)
        return "; ".join([course.failed or "", *(error.problems if error else ())])

    def hear(self, found: Mapping[str, tuple[Mapping[str, float], Sequence[float]]]) -> None:
        """Take the evaluations of a turn, all of them before any is judged.

        Args:
            found: name of an adapter -> its scores, and the loss of every evaluation example.
        """
        self.heard = {
            course.name: _evaluation(course, *found[course.name])
            for course in self.courses
            if course.name in found and math.isfinite(found[course.name][0]["eval_loss"])
        }

    def judge(self, course: Course) -> None:
        """Ask the director whether an adapter goes on after its evaluation of this turn."""
        if self.director is None:
            return
        others = tuple(one for name, one in self.heard.items() if name != course.name)
        self._ask(course, replace(self.heard[course.name], beside=others))

    def _ask(self, course: Course, evaluation: Evaluation) -> None:
        assert self.director is not None
        reason = self.director.judge(evaluation)
        if isinstance(reason, Later):
            self.resting[course.name] = evaluation
            return
        self.resting.pop(course.name, None)
        if reason and not course.done:
            course.stopped = reason

    def ask_again(self, turn: int, tell: Tell) -> None:
        """Ask the director about those who rest; who goes on does so with the turn to come."""
        for course in [c for c in self.courses if c.name in self.resting]:
            was_done = course.done
            self._ask(course, self.resting[course.name])
            if course.name in self.resting or was_done:
                continue
            course.joined = turn - course.step
            if course.stopped:
                tell("info", f"{course.name}: {course.stopped}")

    def welcome(self, turn: int, tell: Tell) -> list[Course]:
        """Let those join whom the director sends, unless it was asked since the last turn.

        Raises:
            ConfigError, DataError: a newcomer that cannot train here.
        """
        if self.director is None or self.asked:
            return []
        self.asked = True
        joined = [
            self._join(newcomer, turn, tell)
            for newcomer in self.director.newcomers({c.name: c.ended for c in self.courses})
        ]
        for course in joined if turn else []:
            tell("info", f"{course.name} joins after turn {turn}")
        return joined

    def rejoin(self, state: State) -> None:
        """Bring those back who had joined when a checkpoint was written.

        Raises:
            CheckpointError: the run had other adapters, and nobody knows them.
        """
        if self.director is not None:
            self.director.restore(state.director)
        known = {course.name for course in self.courses}
        missing = [name for name in state.counters if name not in known]
        if missing and self.director is None:
            raise CheckpointError(
                f"the checkpoint holds adapters that do not train here: {', '.join(missing)}",
                mend="resume with the same adapters, and the same director where there was one",
            )
        by_turn = sorted(missing, key=lambda name: state.counters[name]["joined"])
        for name in by_turn:
            assert self.director is not None
            self._join(self.director.again(name), state.counters[name]["joined"], _nothing)
        self.asked = state.asked

    def let_go(self, turn: int) -> None:
        """Free the moments of those who ended before the newest turn: no checkpoint holds them."""
        for course in self.courses:
            if course.done and course.joined + course.step < turn:
                course.trainee.optimizer.state.clear()

    def save_into(self, state: State) -> None:
        """What belongs to a checkpoint."""
        state.asked = self.asked
        if self.director is not None:
            state.director = dict(self.director.state)
        for course in self.courses:
            course.save_into(state)

    def _join(self, newcomer: Newcomer, turn: int, tell: Tell) -> Course:
        adapter = newcomer.adapter
        if any(course.name == adapter.name for course in self.courses):
            raise ConfigError(f"an adapter {adapter.name!r} was in this run before")
        check_agreement({"the run": self.settings, adapter.name: newcomer.settings})
        self.reuse.admit(self.model, adapter)
        (course,), notes = courses_of(
            self.model,
            self.task,
            {adapter: newcomer.data},
            {adapter: newcomer.eval_data},
            newcomer.settings,
        )
        course.joined = turn
        for note in notes:
            tell("info", note)
        self.courses.append(course)
        return course


def _evaluation(course: Course, scores: Mapping[str, float], losses: Sequence[float]) -> Evaluation:
    return Evaluation(
        name=course.name,
        step=course.step,
        total=course.trainee.total,
        scores=dict(scores),
        best=course.improves(scores["eval_loss"]),
        losses=tuple(losses),
        tokens=tuple(example.num_trained for example in course.held_out),
        rows=tuple(example.row for example in course.held_out),
    )


def _nothing(kind: str, text: str) -> None:
    """Tells nobody: what was told once is not told again."""
