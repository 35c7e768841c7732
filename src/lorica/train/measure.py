"""What a run measures: the loss on held-out records, memory, versions."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Callable, Sequence

import torch
import transformers
from torch import nn

from lorica.data.encode import Example
from lorica.tasks.task import Task, answering, by_length


def mean_loss(
    model: nn.Module,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    *,
    between: Callable[[], None] = lambda: None,
) -> float:
    """Mean negative log-likelihood (nats) per trained token of the model as it is activated.

    Args:
        between: called before every batch; may raise to leave.
    """
    total, count = 0.0, 0
    with answering(model), task.running(model):
        for chosen in by_length([len(e) for e in examples], batch_size):
            between()
            block = [examples[i] for i in chosen]
            total += task.losses(model, task.collate([block], model))[0].item()
            count += sum(e.num_trained for e in block)
    return total / count


def memory_bytes() -> int:
    """Peak memory of the process so far: of the GPU where one is used, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
