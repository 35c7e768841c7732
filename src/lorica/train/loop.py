"""The run around the step: epochs, evaluation, the best adapter, checkpoints, stopping, going on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorica.attach.activate import activate
from lorica.attach.attach import Adapter
from lorica.base.load import base_of
from lorica.config import TrainSettings
from lorica.errors import LoricaError
from lorica.files.peft import save_adapter
from lorica.records.folder import RunFolder
from lorica.records.write import Recorder, RunRecorder
from lorica.tasks.task import Task, device_of
from lorica.train import checkpoint
from lorica.train.course import Course, Window
from lorica.train.engine import Engine
from lorica.train.identity import circumstances, digest, identity
from lorica.train.measure import mean_loss, memory_bytes, versions
from lorica.train.plan import Records, courses_of, default_task, total_steps
from lorica.train.signals import Stop, StopAsked, stopping

__all__ = ["Evaluator", "MakeRecorder", "TrainReport", "default_task", "total_steps", "train"]

Evaluator = Callable[[nn.Module, Adapter], Mapping[str, float]]
"""Scores of an adapter beyond its evaluation loss; called while the adapter is active."""

MakeRecorder = Callable[[int | None], Recorder]


@dataclass(frozen=True)
class TrainReport:
    """What a run did, by adapter name.

    Attributes:
        steps: optimizer steps done.
        loss: mean training loss of the last logged window (nats per trained token).
        eval_loss: of the adapter that was kept; None without evaluation data.
        best_step: the step whose tensors were kept.
        stopped: why training ended early; None where it did not.
        folders: where the adapters were written.
        seconds: spent in optimizer steps, over all tries of a resumed run.
        tokens_per_second, peak_memory_bytes: of the run.
        resources: these and what else run.json says of them.
    """

    steps: dict[str, int]
    loss: dict[str, float | None]
    eval_loss: dict[str, float | None]
    best_step: dict[str, int]
    stopped: dict[str, str | None]
    folders: dict[str, Path]
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    resources: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The outcome as plain values, for run.json."""
        names = ("steps", "loss", "eval_loss", "best_step", "stopped")
        return {name: getattr(self, name) for name in names}


def train(
    model: nn.Module,
    data: Mapping[Adapter | str, Records],
    settings: TrainSettings | None = None,
    *,
    output_dir: str | Path | RunFolder,
    eval_data: Mapping[Adapter | str, Records] | Records | None = None,
    task: Task | None = None,
    evaluator: Evaluator | None = None,
    recorder: MakeRecorder | None = None,
    manifest: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> TrainReport:
    """Train the adapters on their records, all on one base, and write them into a run folder.

    Args:
        model: the base, with the adapters attached.
        data: records for each adapter, by handle or name; or examples that the task has encoded.
        settings: see `TrainSettings`.
        output_dir: the run folder; or one that the caller holds.
        eval_data: held-out records, for all adapters or for each: evaluation loss, the best
            adapter, early stop.
        task: what a loss is; None takes that which the model was loaded for.
        evaluator: further scores at each evaluation.
        recorder: makes what is told of every step and event, given the step that is gone on from;
            the caller then calls its `finish`. None writes the run folder and nothing else.
        manifest: more for run.json than the loop knows, such as the origin of the data.
        resume: go on from the newest checkpoint of the run folder, to the same bits as without the
            stop.

    Raises:
        ConfigError, DataError: settings or records that cannot work; nothing was trained.
        NonFiniteError: a loss or gradient is not finite; checkpoints hold the last good state.
        Interrupted: stopped by SIGINT, SIGTERM or SIGHUP; a checkpoint was written.
        CheckpointError: `resume` with other data, settings or base; or no checkpoint is whole.
    """
    settings = settings or TrainSettings()
    task = task or default_task(model, settings)
    courses, notes = courses_of(model, task, data, eval_data, settings)
    folder = output_dir
    if not isinstance(folder, RunFolder):
        folder = RunFolder.open(folder) if resume else RunFolder.create(folder)
    was_training = model.training
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    engine = Engine(model, task, gradient_checkpointing=settings.gradient_checkpointing)
    try:
        with torch.random.fork_rng(devices):  # every step seeds torch; the caller's state stays
            run = _Run(engine, courses, settings, folder, evaluator)
            return run.go(recorder, dict(manifest or {}), notes, resume=resume)
    finally:
        engine.close()
        model.train(was_training)
        if folder is not output_dir:
            folder.close()


class _Run:
    """The state of `train` between its first and its last step.

    Attributes:
        turn: turns of the loop done: steps of every adapter that has not ended before.
        unjudged: the newest turn was not evaluated and logged yet: it was stopped in between.
        saved: the turn of the newest checkpoint.
    """

    def __init__(
        self,
        engine: Engine,
        courses: list[Course],
        settings: TrainSettings,
        folder: RunFolder,
        evaluator: Evaluator | None,
    ) -> None:
        self.engine, self.courses, self.settings = engine, courses, settings
        self.model, self.task = engine.model, engine.task
        self.folder, self.evaluator = folder, evaluator
        self.identity = identity(self.model, self.task, courses, settings)
        self.turn, self.unjudged, self.saved = 0, False, 0
        self.eval_batch = settings.eval_batch_size or settings.batch_size
        self.save_every = settings.save_steps or min(map(self._eval_every, courses))

    def go(
        self, make: MakeRecorder | None, manifest: dict[str, Any], notes: list[str], *, resume: bool
    ) -> TrainReport:
        """Everything from the first line of run.json to the last."""
        notes = [*self._resume()] + notes if resume else notes
        gone = (self.turn - self.unjudged) if resume else None
        self.recorder: Recorder = (make or self._own_recorder)(gone)
        self.recorder.start({**self._manifest(), **manifest})
        for note in [*notes, *self.task.notes]:
            self.recorder.event("info", note)
        try:
            with stopping() as stop:
                self._train(stop)
            report = self._end()
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt) or hasattr(error, "resumable")
            self._note_failure(error)
            raise
        if make is None:
            self.recorder.finish(
                {
                    "status": "finished",
                    "resources": report.resources,
                    "training": report.summary(),
                }
            )
        return report
