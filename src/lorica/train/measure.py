"""What a run measures: the loss on held-out records, memory, versions."""

from __future__ import annotations

import math
import platform
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from torch import nn

from lorica.base.known import processes_of
from lorica.data.encode import Example
from lorica.tasks.task import Batch, Task, answering, by_length

_STATUS = Path("/proc/self/status")


def mean_loss(
    model: nn.Module,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    *,
    between: Callable[[], None] = lambda: None,
    each: list[float] | None = None,
    collate: Callable[[Sequence[Example]], Batch] | None = None,
) -> float:
    """Mean negative log-likelihood (nats) per trained token of the model as it is activated.

    Args:
        between: called before every batch of this process; may raise to leave.
        each: is filled with the summed loss of every example, in their order.
        collate: makes a batch of examples; None: the task, of whole ones.

    Where processes hold the model together, the batches are dealt out among them.
    """
    losses, processes = [0.0] * len(examples), processes_of(model)
    batches = by_length([len(e) for e in examples], batch_size)
    own = dealt(batches, processes.rank, processes.size) if processes else batches
    with answering(model):
        for chosen in own:
            between()
            block = [examples[i] for i in chosen]
            batch = collate(block) if collate else task.collate([block], model)
            with task.running(model):
                (found,) = task.each_loss(model, batch, [block])
            for i, loss in zip(chosen, found, strict=True):
                losses[i] = loss
    if processes:
        owner = {i: n % processes.size for n, batch in enumerate(batches) for i in batch}
        here = processes.rank
        held = [loss if owner[i] == here else 0.0 for i, loss in enumerate(losses)]
        losses = processes.sums(held)
    if each is not None:
        each[:] = losses
    return math.fsum(losses) / sum(e.num_trained for e in examples)


def dealt(batches: Sequence[list[int]], rank: int, size: int) -> list[list[int]]:
    """The batches of one of several processes, in turn. All have as many, for all take part in a
    pass: whoever lacks one takes the shortest again, for nothing.
    """
    rounds = -(-len(batches) // size)
    places = range(rank, rounds * size, size)
    return [batches[min(place, len(batches) - 1)] for place in places]


def memory_bytes() -> int:
    """Peak memory of the process so far: of the GPU where one is used, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return _high_water_mark() or _max_rss()


def _high_water_mark() -> int | None:
    """Peak resident memory as Linux keeps it for this program; None elsewhere.

    `ru_maxrss` is no such figure there: a child begins with that of the process that started it.
    """
    if not _STATUS.is_file():
        return None
    lines = _STATUS.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM:")), None)


def _max_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
