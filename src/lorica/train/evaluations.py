"""The scores of adapters while they train."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from torch import nn

from lorica.attach.activate import activate
from lorica.attach.handle import Adapter
from lorica.base.known import processes_of
from lorica.tasks.task import answering
from lorica.train.course import Course
from lorica.train.engine import Engine
from lorica.train.judging import eval_batch_size, judged_together, losses_of
from lorica.train.measure import mean_loss
from lorica.train.signals import Stop

Evaluator = Callable[[nn.Module, Adapter], Mapping[str, float]]
"""Scores of an adapter beyond its evaluation loss; called while the adapter is active."""

Found = tuple[dict[str, float], list[float]]
"""Scores of an adapter, and the loss (nats) of every evaluation example."""


class Evaluations:
    """How the adapters of a run are judged.

    Args:
        engine: of the run; it says who goes through the base in one pass.
        evaluator: scores beyond the loss; with one, each adapter has a pass of its own.
        advised: what is held during an evaluation of some adapters, to explain memory that ran out.
    """

    def __init__(
        self,
        engine: Engine,
        evaluator: Evaluator | None,
        advised: Callable[[Sequence[Course]], AbstractContextManager[None]],
    ) -> None:
        self.engine, self.evaluator, self._advised = engine, evaluator, advised

    def of(self, due: Sequence[Course], stop: Stop) -> dict[str, Found]:
        """Name -> what was found of each that is due; a stop in between raises."""
        found: dict[str, Found] = {}
        spread = processes_of(self.engine.model) is not None
        together = self.evaluator is None and len(due) > 1 and not spread
        for group in judged_together(self.engine, due) if together else [[c] for c in due]:
            if len(group) == 1:
                found[group[0].name] = self._alone(group[0], stop)
                continue
            adapters, examples = [c.trainee.adapter for c in group], group[0].held_out
            size = eval_batch_size(group[0])
            with self._advised(group):
                each = losses_of(self.engine, adapters, examples, size, between=stop.check)
            number = sum(e.num_trained for e in examples)
            for course, losses in zip(group, each, strict=True):
                found[course.name] = {"eval_loss": math.fsum(losses) / number}, losses
        return found

    def _alone(self, course: Course, stop: Stop) -> Found:
        engine, adapter = self.engine, course.trainee.adapter
        model = engine.model
        each: list[float] = []
        with self._advised([course]), activate(model, adapter), answering(model):
            loss = mean_loss(
                model,
                engine.task,
                course.held_out,
                eval_batch_size(course),
                between=stop.check,
                each=each,
                collate=lambda block: engine.collating([adapter], [block]),
            )
            stop.check()
            more = self.evaluator(model, adapter) if self.evaluator else {}
        return {"eval_loss": loss, **{f"eval_{name}": value for name, value in more.items()}}, each
