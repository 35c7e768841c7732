"""The run around the step: evaluation, the best adapter, checkpoints, stopping, going on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorica.attach.handle import Adapter
from lorica.base.known import base_of, processes_of
from lorica.errors import ConfigError, Interrupted, LoricaError, NonFiniteError, TrainingError
from lorica.files.adapter import save_adapter
from lorica.records.folder import RunFolder, how_to_resume
from lorica.records.write import Recorder, RunRecorder
from lorica.tasks.task import Task, device_of
from lorica.train import checkpoint
from lorica.train.agreement import Given, of_the_run
from lorica.train.beginnings import Beginnings, beginnings_of
from lorica.train.company import Company, Tell
from lorica.train.course import Course, Window
from lorica.train.director import Director
from lorica.train.dividing import Divided, differentiated
from lorica.train.engine import Engine, Sharing, StepResult, nothing_shared
from lorica.train.evaluations import Evaluations, Evaluator
from lorica.train.identity import circumstances, identity, identity_of
from lorica.train.measure import memory_bytes
from lorica.train.memory import memory_advised
from lorica.train.plan import Records, courses_of, default_task, total_steps
from lorica.train.relay import Passing, Relay
from lorica.train.report import TrainReport, entry, provenance
from lorica.train.report import manifest as manifest_of
from lorica.train.reuse import reuse_of
from lorica.train.shared import SharedLayers
from lorica.train.signals import Stop, StopAsked, stopping

__all__ = ["Evaluator", "MakeRecorder", "TrainReport", "default_task", "total_steps", "train"]

MakeRecorder = Callable[[int | None], Recorder]

PAUSE = 0.1
"""Seconds between two questions to a director for whom all wait."""


def train(
    model: nn.Module,
    data: Mapping[Adapter | str, Records],
    settings: Given | None = None,
    *,
    output_dir: str | Path | RunFolder,
    eval_data: Mapping[Adapter | str, Records] | Records | None = None,
    task: Task | None = None,
    evaluator: Evaluator | None = None,
    recorder: MakeRecorder | None = None,
    manifest: Mapping[str, Any] | None = None,
    resume: bool = False,
    director: Director | None = None,
    relay: Relay | None = None,
) -> TrainReport:
    """Train the adapters on their records, all on one base, and write them into a run folder.

    Args:
        model: the base, with the adapters attached.
        data: records for each adapter, by handle or name; or examples that the task has encoded.
        settings: see `TrainSettings`; for all adapters, or for each by handle or name. What belongs
            to the run as a whole (`agreement.OF_THE_RUN`) must be the same for all.
        output_dir: the run folder; or one that the caller holds.
        eval_data: held-out records, for all adapters or for each: evaluation loss, the best
            adapter, early stop.
        task: what a loss is; None takes that which the model was loaded for, with a line break
            between prompt and completion where no white space in the records parts them.
        evaluator: further scores at each evaluation.
        recorder: makes what is told of every step and event, given the step that is gone on from;
            the caller then calls its `finish` and writes the tokenizer beside the adapter. None
            writes the run folder, with the tokenizer of a loaded base, and nothing else.
        manifest: more for run.json than the loop knows, such as the origin of the data.
        resume: go on from the newest checkpoint of the run folder, to the same bits as without the
            stop.
        director: ends adapters before their last step, and sends in new ones; see `Director`.
            `data` may be empty then, and `settings` say what belongs to the run.
        relay: other runs to which this one hands adapters on. It then writes the state of every
            adapter by itself, instead of checkpoints of the run, and whoever trains here goes on
            from its state where there is one; see `Relay`.

    Raises:
        ConfigError, DataError: settings or records that cannot work; nothing was trained.
        NonFiniteError: a loss or gradient is not finite; checkpoints hold the last good state. Of
            several adapters the one ends, and is reported as failed; then all of them did.
        Interrupted: stopped by SIGINT, SIGTERM or SIGHUP; a checkpoint was written.
        CheckpointError: `resume` with other data, settings or base; or no checkpoint is whole.
    """
    run = of_the_run(settings)
    task = task or default_task(model, run, data.values())
    courses, notes = [], []
    if data or director is None:
        courses, notes = courses_of(model, task, data, eval_data, settings or run)
    folder = output_dir
    if not isinstance(folder, RunFolder):
        folder = RunFolder.open(folder) if resume else RunFolder.create(folder)
    was_training = model.training
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    reuse = reuse_of(model, task, courses, run)
    reuses = reuse.layers is not None
    processes = processes_of(model)
    together = beginnings_of(model, task, wanted=run.share_prompts, reuses=reuses)
    dividing = Divided(processes, whole=len(courses) >= processes.size) if processes else None
    engine = Engine(
        model,
        task,
        gradient_checkpointing=run.gradient_checkpointing,
        skipping=reuse.skipped,
        sharing=_sharing(model, task, reuses, together),
        collating=together.collate,
        dividing=dividing,
    )
    notes += [*reuse.notes, *together.notes(courses)]
    if dividing is not None:
        notes += dividing.notes([c.trainee for c in courses])
    try:
        downward = differentiated(model) if processes else nullcontext()
        # every step seeds torch; the caller's state stays
        with torch.random.fork_rng(devices), downward:
            company = Company(model, task, courses, run, director, reuse)
            one = _Run(engine, company, folder, evaluator, relay)
            return one.go(recorder, dict(manifest or {}), notes, resume=resume)
    finally:
        engine.close()
        reuse.close()
        model.train(was_training)
        if folder is not output_dir:
            folder.close()


class _Run:
    """The state of `train` between its first and its last step.

    Attributes:
        company: the adapters, and who decides about them.
        turn: turns of the loop done: steps of every adapter that has not ended before.
        unjudged: those whose newest step was not evaluated and logged yet.
        saved: the turn of the newest checkpoint.
        passing: what comes from other runs and goes there; None where there are none.
        tokenizer: is written beside the adapters; None where the caller does, or there is none.
        seconds: spent in optimizer steps, over all tries.
        last_save: when the newest checkpoint was done, and how many seconds it took.
    """

    def __init__(
        self,
        engine: Engine,
        company: Company,
        folder: RunFolder,
        evaluator: Evaluator | None,
        relay: Relay | None,
    ) -> None:
        self.engine, self.company = engine, company
        self.courses, self.settings = company.courses, company.settings
        self.model, self.task = engine.model, engine.task
        self.folder = folder
        self.evaluations = Evaluations(
            engine, evaluator, lambda courses: self._advised(courses, "an evaluation")
        )
        self.turn, self.saved, self.seconds = 0, 0, 0.0
        self.unjudged: list[Course] = []
        self.last_save = -math.inf, 0.0
        self.passing = Passing(relay, company) if relay is not None else None
        self.processes = processes_of(self.model)
        self.identity = identity(self.model, self.task, company.courses, company.settings)

    def go(
        self, make: MakeRecorder | None, manifest: dict[str, Any], notes: list[str], *, resume: bool
    ) -> TrainReport:
        """Everything from the first line of run.json to the last."""
        checkpoint.clean(self.folder.checkpoints)
        told = [*self._resume(), *notes] if resume else [*notes]
        gone = self.turn - bool(self.unjudged) if resume else None
        for course in self.courses:
            self._take_up(course, lambda kind, text: told.append(text))
        if not self.turn:
            self._welcome(lambda kind, text: told.append(text))
        if not self.courses:
            raise ConfigError("there is nothing to train", expected="{adapter: records}")
        make_one = make or (lambda step: RunRecorder(self.folder, resumed_step=step))
        self.recorder: Recorder = make_one(gone)
        base = base_of(self.model)
        self.tokenizer = base.tokenizer if base and make is None else None
        own = manifest_of(
            self.model,
            self.task,
            self.courses,
            seed=self.settings.seed,
            dtype=self.identity["dtype of the base"],
            adapters=self._entries(),
        )
        plan = {**own["plan"], **manifest.get("plan", {})}
        self.recorder.start({**own, **manifest, "plan": plan})
        for note in [*told, *self.task.notes, *self.engine.lean.notes]:
            self.recorder.event("info", note)
        tensors = [p for c in self.courses for p in c.trainee.adapter.parameters()]
        if note := checkpoint.space_warning(self.folder.path, tensors, self.settings):
            self.recorder.event("warning", note)
        try:
            with stopping(self.processes.highest if self.processes else None) as stop:
                report = self._train(stop)
        except (Interrupted, KeyboardInterrupt):
            self.recorder.finish({"status": "interrupted"})
            raise
        except BaseException as error:
            kind = "" if isinstance(error, LoricaError) else f"{type(error).__name__}: "
            self.recorder.finish({"status": "failed", "error": f"{kind}{error}"})
            raise
        if make is None:
            self.recorder.finish({"status": "finished", **report.outcome()})
        return report

    def _train(self, stop: Stop) -> TrainReport:
        try:
            if self.unjudged:
                self._judge(stop)
            self._welcome(self.recorder.event)
            while not self._done:
                stop.check()
                if self.unjudged:  # one has joined so
                    self._judge(stop)
                elif self.company.working:
                    self._turn(stop)
                else:  # all rest: what they wait for comes from outside
                    time.sleep(PAUSE)
                    self.company.asked = False
                self._welcome(self.recorder.event)
            stop.check()
            self.company.refuse_if_all_failed()
            report = self._end()
            stop.check()
        except StopAsked:
            self._save()
            raise stop.error(self.folder.path, saved=True) from None
        except KeyboardInterrupt:
            if stop.asked is None:  # not from our own handler
                raise
            raise stop.error(self.folder.path, saved=False) from None
        return report

    def _name_records(self, error: NonFiniteError) -> None:
        """Add where the records lie that the error counts, where that is known."""
        origins = next((c.origins for c in self.courses if c.name == error.adapter), ())
        places = [":".join(map(str, origins[row])) for row in error.rows[:10] if row < len(origins)]
        error.problems += tuple(f"record {place}" for place in places)

    @property
    def _done(self) -> bool:
        return not self.unjudged and self.company.done

    def _welcome(self, tell: Tell) -> None:
        self.company.ask_again(self.turn, tell)
        self._hand_on(tell)
        joined = self.company.welcome(self.turn, tell)
        for course in joined:
            self.identity |= identity_of(course, self.settings)
            self._take_up(course, tell)
        if joined:
            self.engine.look_again()

    def _hand_on(self, tell: Tell) -> None:
        """Let those go whom another run is to train further."""
        if self.passing is not None and not self.unjudged and self.passing.hand_on(tell):
            self.engine.look_again()

    def _take_up(self, course: Course, tell: Tell) -> None:
        """Let an adapter go on from where another run has left it."""
        if self.passing is not None and self.passing.take_up(course, self.turn, tell):
            self.unjudged.append(course)

    def _turn(self, stop: Stop) -> None:
        """One step of every adapter that has not ended, and what is due after it."""
        self.company.let_go(self.turn)
        began = time.monotonic()
        results = self._step()
        seconds = time.monotonic() - began
        for course, result in results:
            course.add(result, seconds)
        self.seconds += seconds
        self.turn += 1
        self.unjudged = [course for course, _ in results]
        self._judge(stop)
        if self.passing is not None:
            self._save_states(self.courses if self._done else self._due_states())
        elif self._done or (self.turn % self._save_every() == 0 and self._may_save()):
            self._save()

    def _step(self) -> list[tuple[Course, StepResult]]:
        """A step of each; those whose numbers are not finite fail, and the others step without
        them.
        """
        while working := self.company.working:
            work = [c.micro_batches() for c in working]
            try:
                with self._advised(working, f"step {self.turn + 1}"):
                    results = self.engine.step([c.trainee for c in working], work)
                return list(zip(working, results, strict=True))
            except NonFiniteError as error:  # no tensor of anybody was changed
                broken = next(c for c in working if c.name == error.adapter)
                self._name_records(error)
                self.company.fail(broken, error, self.recorder.event)
        return []

    def _save_every(self) -> int:
        """Turns between checkpoints: as set, or with the evaluations."""
        every = map(self._eval_every, self.company.working)
        return self.settings.save_steps or min(every, default=1)

    def _judge(self, stop: Stop) -> None:
        """Evaluate and log what is due. Nothing changes until all evaluations are through, so that
        a stop in between leaves the state of the finished step.
        """
        fresh, self.company.asked = self.unjudged, False
        due = [c for c in fresh if c.held_out and c.due(self._eval_every(c))]
        found = self.evaluations.of(due, stop)
        self.unjudged = []
        self.company.hear(found)
        for course in fresh:
            scores, _ = found.get(course.name, ({}, []))
            if scores or course.due(self.settings.logging_steps):
                self._log(course, scores)
            if scores:
                self._take(course, scores)

    def _advised(self, courses: Sequence[Course], what: str) -> AbstractContextManager[None]:
        largest = max(courses, key=lambda c: c.settings.batch_size).settings
        return memory_advised(self.model, courses, largest, self.folder.path, what)

    def _eval_every(self, course: Course) -> int:
        """Steps between evaluations: as set, or an epoch."""
        return course.settings.eval_steps or course.steps_per_epoch

    def _take(self, course: Course, scores: dict[str, float]) -> None:
        who = "" if self.company.alone else f"{course.name}: "
        try:
            best = course.judge(scores["eval_loss"])
        except NonFiniteError as error:
            return self.company.fail(course, error, self.recorder.event)
        if best:
            text = f"best so far, step {course.step}, eval loss {course.eval_loss:.4f}"
            self.recorder.event("best", f"{who}{text}")
        self.company.judge(course)
        if course.stopped:
            self.recorder.event("info", f"{who}{course.stopped}")

    def _log(self, course: Course, scores: dict[str, float]) -> None:
        window, course.window = course.window, Window()
        course.last_loss = window.loss
        self.recorder.step(
            {
                "step": course.step,
                **({"turn": self.turn} if course.joined else {}),
                "epoch": round(course.step / course.steps_per_epoch, 4),
                "adapter": course.name,
                "loss": window.loss,
                **scores,
                "learning_rate": window.learning_rate,
                "grad_norm": window.grad_norm,
                "tokens": course.tokens,
                "tokens_per_second": window.rate,
                "memory_bytes": memory_bytes(),
            }
        )

    # checkpoints

    def _may_save(self) -> bool:
        """Whether it is worth it: without `save_steps` at most a twentieth of the time."""
        ended, cost = self.last_save
        return self.settings.save_steps is not None or time.monotonic() - ended >= 20 * cost

    def _due_states(self) -> list[Course]:
        """Whose state is to be written after a turn."""
        if not self._may_save():
            return []
        every = self.settings.save_steps
        return [c for c in self.courses if c.done or c.step % (every or self._eval_every(c)) == 0]

    def _save_states(self, courses: Sequence[Course]) -> None:
        assert self.passing is not None
        began = time.monotonic()
        if written := self.passing.save(courses, {c.name for c in self.unjudged}):
            self.last_save = time.monotonic(), time.monotonic() - began
            self.recorder.event("checkpoint", f"state written of {', '.join(written)}")

    def _save(self) -> None:
        if self.passing is not None:
            return self._save_states(self.courses)
        if self.saved == self.turn:
            return
        began = time.monotonic()
        state = checkpoint.State(
            self.turn,
            self.identity,
            circumstances(self.model, self.settings, self.courses),
            unjudged=bool(self.unjudged),
            seconds=self.seconds,
        )
        self.company.save_into(state)  # refuses tensors that are not finite
        checkpoint.save(self.folder.checkpoints, state, keep=self.settings.save_total_limit)
        ended = time.monotonic()
        self.saved, self.last_save = self.turn, (ended, ended - began)
        self.recorder.event("checkpoint", f"checkpoint of step {self.turn} written")

    def _resume(self) -> list[str]:
        """Go on from the newest whole checkpoint; returns what the user should be told."""
        state, notes = checkpoint.newest(self.folder.checkpoints)
        if state is None:
            return [*notes, "there is no checkpoint yet: starting from the beginning"]
        self.company.rejoin(state)
        self.engine.look_again()
        self.identity = identity(self.model, self.task, self.courses, self.settings)
        now = circumstances(self.model, self.settings, self.courses)
        notes += checkpoint.check(state, self.identity, now)
        for course in self.courses:
            course.restore(state)
        self.turn = self.saved = state.step
        self.seconds = state.seconds
        if state.unjudged:
            fresh = (c for c in self.courses if c.step and c.joined + c.step == self.turn)
            self.unjudged = [*fresh]
        return [*notes, f"going on from step {state.step}"]

    # the end

    def _end(self) -> TrainReport:
        """Write the adapters, the best ones where that is wanted."""
        folders = {}
        for c in self.courses:
            if note := c.finish():
                self.recorder.event("info", note)
            if not (c.failed and c.broken):
                folders[c.name] = self._publish(c)
        elsewhere = self.passing.tokens if self.passing is not None else 0
        seconds, tokens = self.seconds, sum(c.tokens for c in self.courses) - elsewhere
        report = TrainReport(
            steps={c.name: c.step for c in self.courses},
            loss={c.name: c.last_loss for c in self.courses},
            eval_loss={c.name: c.best_loss if c.keeps_best else c.eval_loss for c in self.courses},
            best_step={c.name: c.best_step if c.keeps_best else c.step for c in self.courses},
            stopped={c.name: c.stopped for c in self.courses},
            folders=folders,
            seconds=seconds,
            tokens_per_second=tokens / seconds if seconds else 0.0,
            peak_memory_bytes=memory_bytes(),
            adapters=self._entries(),
            failed={c.name: c.failed for c in self.courses},
        )
        files = [f for folder in folders.values() for f in folder.glob("*.safetensors")]
        report.resources.update(
            seconds=seconds,
            tokens_per_second=report.tokens_per_second,
            peak_memory_bytes=report.peak_memory_bytes,
            num_threads=torch.get_num_threads(),
            device=str(device_of(self.model)),
            adapter_bytes=sum(f.stat().st_size for f in files),
        )
        return report

    def _publish(self, course: Course) -> Path:
        target, adapter = self._target(course), course.trainee.adapter
        data = self.identity[f"data of {course.name}"].rpartition(" ")[2]
        origin = provenance(course, self.task, data)
        how: dict[str, Any] = {"provenance": origin, "tokenizer": self.tokenizer}
        try:
            return save_adapter(adapter, target, overwrite=True, **how)
        except Exception as error:  # a tokenizer's own writer raises a bare Exception
            if not (isinstance(error, OSError) or "os error" in str(error)):
                raise
            raise TrainingError(
                f"the adapter could not be written in {target}: "
                f"{getattr(error, 'strerror', None) or error}",
                expected="the checkpoint of the last step holds it",
                mend=f"free space, then: {how_to_resume(self.folder.path)}",
            ) from error

    def _target(self, course: Course) -> Path:
        return self.folder.adapter(None if self.company.alone else course.name)

    def _entries(self) -> dict[str, dict[str, Any]]:
        return {c.name: entry(c, self._target(c)) for c in self.courses}


def _sharing(model: nn.Module, task: Task, reuses: bool, together: Beginnings) -> Sharing:
    """What holds during a pass of several adapters. Where processes hold the base together, each
    has other adapters in its pass, and all must run the same layers.
    """
    if reuses or processes_of(model) is not None:
        return nothing_shared
    return SharedLayers(model, task, together).shared
