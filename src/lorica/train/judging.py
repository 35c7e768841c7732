"""Evaluation of several adapters on the same records, in passes that they share.

The base multiplies the rows of all adapters at once, and the layers below the lowest adapted one
are run once for all (`train.shared`). Each adapter's rows are the block that they are when it has
the pass for itself, so that its losses are the same to the last bit: see `Engine.groups`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorica.attach.activate import Activation, activate
from lorica.attach.attach import Adapter
from lorica.attach.plates import Route
from lorica.data.encode import Example
from lorica.tasks.task import answering, by_length
from lorica.train.course import Course
from lorica.train.engine import Engine
from lorica.train.passes import named_ranges, passes_of


def judged_together(engine: Engine, courses: Sequence[Course]) -> list[list[Course]]:
    """The adapters in groups: those that are judged on the same records and may share passes."""
    by_records: dict[tuple[int, ...], list[Course]] = {}
    for course in courses:
        key = (eval_batch_size(course), *map(id, course.held_out))
        by_records.setdefault(key, []).append(course)
    return [
        [alike[i] for i in group]
        for alike in by_records.values()
        for group in engine.groups([course.trainee for course in alike])
    ]


def eval_batch_size(course: Course) -> int:
    """Records in a batch of an evaluation."""
    return course.settings.eval_batch_size or course.settings.batch_size


def losses_of(
    engine: Engine,
    adapters: Sequence[Adapter],
    examples: Sequence[Example],
    batch_size: int,
    *,
    between: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Summed loss (nats) of every example with each adapter.

    Args:
        adapters: a group of `judged_together`.
        between: called before every pass; may raise to leave.
    """
    losses = [[0.0] * len(examples) for _ in adapters]
    with answering(engine.model):
        for chosen in by_length([len(e) for e in examples], batch_size):
            block = [examples[i] for i in chosen]
            tokens = [sum(map(len, block))] * len(adapters)
            for part in passes_of(range(len(adapters)), tokens):
                between()
                found = _pass(engine, [adapters[i] for i in part], block)
                for own, each in zip(part, found, strict=True):
                    for place, loss in zip(chosen, each, strict=True):
                        losses[own][place] = loss
    return losses


def _pass(
    engine: Engine, adapters: Sequence[Adapter], block: Sequence[Example]
) -> list[list[float]]:
    """The losses of one block of examples, with each adapter."""
    model, blocks = engine.model, [block] * len(adapters)
    batch = engine.collating(adapters, blocks)
    if len(adapters) == 1:
        with engine.task.running(model), activate(model, adapters[0]):
            return engine.task.each_loss(model, batch, blocks)
    names = tuple(adapter.name for adapter in adapters)
    kept = None if batch.kept is None else named_ranges(batch.kept.ranges, names)
    route = Route(names, None, named_ranges(batch.rows or (), names), kept)
    shared = engine.sharing(adapters, blocks, batch)
    with engine.task.running(model), shared, Activation(model, route):
        return engine.task.each_loss(model, batch, blocks)
