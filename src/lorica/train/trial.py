"""A small search before a run: each candidate is trained as the run would be, and judged by its
eval loss.

Nothing is written: the adapters of the trial are taken off again, and what is kept is a setting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lorica.attach.activate import activate
from lorica.attach.attach import attach, detach
from lorica.config import TrainSettings
from lorica.errors import ConfigError
from lorica.methods.selective import Selective
from lorica.tasks.task import Task, answering, device_of
from lorica.train.course import Course
from lorica.train.engine import Engine
from lorica.train.measure import mean_loss
from lorica.train.plan import Records, courses_of


@dataclass(frozen=True)
class Trial:
    """What a trial found.

    Attributes:
        setting: what was tried out.
        losses: candidate -> its lowest eval loss (nats per trained token).
    """

    setting: str
    losses: dict[int, float]

    @property
    def best(self) -> int:
        """The candidate of the lowest loss; the smaller one of equals."""
        return min(self.losses, key=lambda number: (self.losses[number], number))

    def __str__(self) -> str:
        shown = ", ".join(f"{number}: {loss:.4f}" for number, loss in self.losses.items())
        return f"the lowest eval loss of {shown}"


def choose_top_layers(
    model: nn.Module,
    method: Selective,
    task: Task,
    examples: Records,
    held_out: Records,
    settings: TrainSettings,
    *,
    between: Callable[[], None] = lambda: None,
) -> tuple[Selective, Trial]:
    """How many of the last layers should begin anew: each number in `method.reinit_top_layers` is
    trained with all steps of the run, and judged on `held_out`.

    Args:
        method: its reinit_top_layers holds the candidates.
        between: called before every step; may raise to leave.

    Returns:
        the method with one number, and what was found.

    Raises:
        ConfigError: there are no candidates, or no records to judge them by.
        TargetError: a candidate is more than the model has layers. The model is unchanged.
    """
    if not method.candidates:
        raise ConfigError(
            f"reinit_top_layers is {method.reinit_top_layers}: there is nothing to choose",
            expected="a list such as 0,1,2",
        )
    if not len(held_out):
        raise ConfigError(
            f"reinit_top_layers={list(method.candidates)} is chosen by eval loss, and there are no "
            "records to evaluate on",
            mend="give eval_data or eval_size, or one number",
        )
    losses = {}
    for number in method.candidates:
        candidate: Any = replace(method, reinit_top_layers=number)
        adapter = attach(model, candidate, name=f"trial-{number}", seed=settings.seed)
        try:
            (course,), _ = courses_of(model, task, {adapter: examples}, held_out, settings)
            losses[number] = _lowest_loss(model, task, course, between)
        finally:
            detach(model, adapter)
    trial = Trial("reinit_top_layers", losses)
    return replace(method, reinit_top_layers=trial.best), trial


def _lowest_loss(
    model: nn.Module, task: Task, course: Course, between: Callable[[], None]
) -> float:
    """Train to the end of the course; the lowest eval loss on the way."""
    settings, was_training = course.settings, model.training
    every = settings.eval_steps or course.steps_per_epoch
    size = settings.eval_batch_size or settings.batch_size
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    engine = Engine(model, task, gradient_checkpointing=settings.gradient_checkpointing)
    try:
        with torch.random.fork_rng(devices):
            while not course.done:
                between()
                engine.step([course.trainee], [course.micro_batches()])
                if course.due(every):
                    with activate(model, course.trainee.adapter), answering(model):
                        course.judge(mean_loss(model, task, course.held_out, size, between=between))
    finally:
        engine.close()
        model.train(was_training)
    assert course.best_loss is not None
    return course.best_loss
