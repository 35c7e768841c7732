"""How long a run will take: measured on a few real batches, or from what the machine multiplies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorica.attach.handle import Adapter
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.tasks.task import Task, device_of
from lorica.train.beginnings import beginnings_of
from lorica.train.engine import Engine, Trainee

PROBED_STEPS, SIDE, PRODUCTS = 3, 1024, 5


@dataclass(frozen=True)
class Pace:
    """Tokens per second, padding not counted; `how` it was found, for the user."""

    tokens_per_second: float
    how: str


def probed(
    model: nn.Module,
    adapter: Adapter,
    task: Task,
    blocks: Sequence[Sequence[Example]],
    settings: TrainSettings,
) -> Pace:
    """A few real steps of the real model, after one that is not counted. The adapter is changed.

    Args:
        blocks: batches of usual size.
    """
    trainee = Trainee(adapter, settings, total=1 + PROBED_STEPS)
    reuses = settings.reuse_frozen_layers is not None
    together = beginnings_of(model, task, wanted=settings.share_prompts, reuses=reuses)
    how = settings.gradient_checkpointing
    engine = Engine(model, task, gradient_checkpointing=how, collating=together.collate)
    seconds = tokens = 0.0
    try:
        with torch.random.fork_rng([device_of(model)] if device_of(model).type == "cuda" else []):
            for number in range(1 + PROBED_STEPS):
                block = blocks[number % len(blocks)]
                began = time.perf_counter()
                engine.step([trainee], [[block]])
                if number:
                    seconds += time.perf_counter() - began
                    tokens += sum(e.num_tokens for e in block)
    finally:
        engine.close()
    return Pace(tokens / seconds, f"measured: {PROBED_STEPS} steps of this run on this machine")


def by_law(num_parameters: int, dtype: torch.dtype, device: torch.device) -> Pace:
    """The limit of a step with a frozen base: 4 N floating-point operations per token (2 forward, 2
    for the gradients of inputs), at the rate at which this machine multiplies matrices now.

    Args:
        num_parameters: N, of the linear layers.
    """
    a, b = (torch.ones(SIDE, SIDE, dtype=dtype, device=device) for _ in "ab")
    best = float("inf")
    for _ in range(PRODUCTS):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    rate = 2 * SIDE**3 / best
    how = (
        f"the limit: 4 x {num_parameters:,} operations per token at the {rate / 1e9:,.0f} "
        "GFLOP/s of a matrix product here; a run takes longer"
    )
    return Pace(rate / (4 * num_parameters), how)
