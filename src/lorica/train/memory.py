"""What to do when memory runs out: the settings that lower it, each with its numbers here.

The first advice costs nothing but time: smaller batches, more of them to a step. The same records
make the same optimizer step, so a run that was stopped by it goes on from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from lorica.config import TrainSettings
from lorica.errors import OutOfMemory, is_out_of_memory
from lorica.records.folder import how_to_resume
from lorica.tasks.task import device_of
from lorica.train.adamw_8bit import SMALLEST
from lorica.train.course import Course
from lorica.train.measure import memory_bytes


@contextmanager
def memory_advised(
    model: nn.Module, courses: Sequence[Course], settings: TrainSettings, folder: Path, what: str
) -> Iterator[None]:
    """Turn an allocation that fails in here into advice.

    Args:
        courses: those whose records are at work.
        what: is being done: "step 7", "an evaluation".

    Raises:
        OutOfMemory: memory ran out. What trains may be half changed: nothing of it may be saved.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        told = str(error).strip().splitlines()
        raise OutOfMemory(
            f"memory ran out in {what} ({device_of(model)}, {memory_bytes():,} bytes at most so "
            f"far{_available()})",
            problems=[*told[:1], *levers(model, courses, settings, evaluating="step" not in what)],
            expected="the last checkpoint stands; the first settings named here can go on from it",
            mend=f"{how_to_resume(folder)} with them, or another run with the others",
        ) from error


def levers(
    model: nn.Module, courses: Sequence[Course], settings: TrainSettings, *, evaluating: bool
) -> list[str]:
    """What can be lowered and from what to what; the cheapest first."""
    size, number = settings.batch_size, settings.gradient_accumulation_steps
    found = []
    if evaluating:
        batch = settings.eval_batch_size or size
        if batch > 1:
            found.append(f"eval_batch_size: {batch} -> {batch // 2} (another run)")
    elif size > 1:
        parts = next(n for n in range(2, size + 1) if size % n == 0)
        found.append(
            f"batch_size: {size} -> {size // parts} with gradient_accumulation_steps: {number} -> "
            f"{number * parts}: the same records in each step, {_part(parts)} of them at a time"
        )
    if not settings.gradient_checkpointing and getattr(
        model, "supports_gradient_checkpointing", False
    ):
        found.append("gradient_checkpointing: true: activations are computed twice, not kept")
    elif settings.gradient_checkpointing is True and device_of(model).type != "cpu":
        found.append("gradient_checkpointing: offload: what layers were given waits in the host")
    lengths = sorted(len(e) for c in courses for e in (c.held_out if evaluating else c.examples))
    if lengths:
        found.append(
            f"max_length: the longest record has {lengths[-1]:,} tokens, nine of ten at most "
            f"{lengths[len(lengths) * 9 // 10]:,} (another run)"
        )
    frozen = sum(p.numel() * p.element_size() for p in model.parameters())
    if next(model.parameters()).dtype == torch.float32:
        found.append(f"dtype: bfloat16: {frozen // 2:,} bytes less for the base (another run)")
    trained = sum(p.numel() for c in courses for p in _trained(c))
    narrow = settings.optim == "adamw_8bit"
    whole = (10 if narrow else 16) * trained  # with gradient and two moments
    if whole > frozen // 10:
        if not narrow and any(p.numel() >= SMALLEST for c in courses for p in _trained(c)):
            found.append(f"optim: adamw_8bit: about {6 * trained:,} bytes less (another run)")
        found.append(f"r: what trains takes {whole:,} bytes (another run)")
    return found


def _trained(course: Course) -> list[nn.Parameter]:
    return list(course.trainee.adapter.parameters())


def _part(parts: int) -> str:
    return {2: "half", 3: "a third"}.get(parts, f"1/{parts}")


def _available() -> str:
    """What the machine has left, where it says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return ""
    fields = dict(line.split(":") for line in lines)
    kilobytes = int(fields.get("MemAvailable", "0 kB").split()[0])
    return f"; {kilobytes * 1024:,} bytes of the machine are free" if kilobytes else ""
