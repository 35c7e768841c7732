"""The run around the step: epochs, evaluation, the best adapter, checkpoints, stopping, going on."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lorica.attach.activate import activate
from lorica.attach.attach import Adapter, find
from lorica.base.load import base_of
from lorica.config import TrainSettings
from lorica.data.encode import Example
from lorica.data.pack import order
from lorica.errors import ConfigError, DataError, Interrupted, LoricaError
from lorica.files.peft import save_adapter
from lorica.records.folder import RunFolder
from lorica.records.write import Recorder, RunRecorder
from lorica.tasks import CausalLM, Seq2Seq, TextClassification
from lorica.tasks.task import Task, by_length
from lorica.train import checkpoint
from lorica.train.engine import Engine, StepResult, Trainee

Evaluator = Callable[[nn.Module, Adapter], Mapping[str, float]]
"""Scores of an adapter beyond its evaluation loss; called while the adapter is active."""

MakeRecorder = Callable[[int | None], Recorder]

COSMETIC = {"logging_steps", "save_steps", "save_total_limit"}
"""Settings that a resumed run may change: they change what is written, not what is learned."""


@dataclass
class Course:
    """How far one adapter has come.

    Attributes:
        trainee: the adapter and its optimizer.
        examples: its training records, encoded.
        held_out: its evaluation records, encoded.
        best_loss, best_step, best: of the evaluation so far; `best` holds the tensors.
        stale: evaluations in a row without a better loss.
        stopped: why it ended before its last step, or None.
    """

    trainee: Trainee
    examples: list[Example]
    held_out: list[Example]
    best_loss: float = math.inf
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    stale: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    stopped: str | None = None
    eval_loss: float | None = None

    @property
    def name(self) -> str:
        return self.trainee.adapter.name

    @property
    def settings(self) -> TrainSettings:
        return self.trainee.settings

    @property
    def per_step(self) -> int:
        return self.settings.batch_size * self.settings.gradient_accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.examples) / self.per_step)

    @property
    def done(self) -> bool:
        return self.stopped is not None or self.trainee.step >= self.trainee.total

    def micro_batches(self) -> list[list[Example]]:
        """The micro-batches of the step to come: a function of seed and step, so that nothing need be stored."""
        epoch, place = divmod(self.trainee.step, self.steps_per_epoch)
        permutation = order(len(self.examples), seed=self.settings.seed, epoch=epoch)
        chosen = [int(i) for i in permutation[place * self.per_step : (place + 1) * self.per_step]]
        size = self.settings.batch_size
        return [
            [self.examples[i] for i in chosen[at : at + size]] for at in range(0, len(chosen), size)
        ]


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
        seconds, tokens_per_second, peak_memory_bytes: of the run.
    """

    steps: dict[str, int]
    loss: dict[str, float]
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
        return {
            "steps": self.steps,
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "best_step": self.best_step,
            "stopped": self.stopped,
        }


def train(
    model: nn.Module,
    data: Mapping[Adapter | str, Sequence[dict] | Sequence[Example]],
    settings: TrainSettings | None = None,
    *,
    output_dir: str | Path | RunFolder,
    eval_data: Mapping[Adapter | str, Sequence[dict]] | Sequence[dict] | None = None,
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
        eval_data: held-out records, for all adapters or for each: evaluation loss, the best adapter, early stop.
        task: what a loss is; None takes that which the model was loaded for.
        evaluator: further scores at each evaluation.
        recorder: makes what is told of every step and event, given the step that is gone on from; the caller
            then calls its `finish`. None writes the run folder and nothing else.
        manifest: more for run.json than the loop knows, such as the origin of the data.
        resume: go on from the newest checkpoint of the run folder, to the same bits as without the stop.

    Raises:
        ConfigError, DataError: settings or records that cannot work; nothing was trained.
        NonFiniteError: a loss or gradient is not finite; checkpoints hold the last good state.
        Interrupted: stopped by SIGINT or SIGTERM; a checkpoint was written.
        CheckpointError: `resume` with other data, settings or base.
    """
    settings = settings or TrainSettings()
    folder = (
        output_dir if isinstance(output_dir, RunFolder) else _open_folder(Path(output_dir), resume)
    )
    own_folder = folder is not output_dir
    try:
        task = task or default_task(model, settings)
        courses = _courses(model, task, data, eval_data, settings)
        run = _Run(
            model, task, courses, settings, folder, recorder, evaluator, dict(manifest or {})
        )
        run.prepare(resume)
        return run.go()
    finally:
        if own_folder:
            folder.close()


def default_task(model: nn.Module, settings: TrainSettings) -> Task:
    """The task that a model was loaded for. Raises ConfigError where Lorica did not load it."""
    base = base_of(model)
    if base is None:
        raise ConfigError(
            "this model was not loaded by lorica.load_model, so its task is not known",
            mend="pass task=..., for example lorica.tasks.CausalLM(tokenizer)",
        )
    if base.task == "text-classification":
        return TextClassification(base.tokenizer, base.labels, settings.max_length)
    if base.task == "seq2seq":
        return Seq2Seq(base.tokenizer, settings.max_length)
    return CausalLM.of(base.tokenizer, max_length=settings.max_length, packing=settings.packing)


def _encoded(task: Task, records: Sequence[Any]) -> list[Example]:
    """Records as examples; those that are encoded already pass."""
    if not len(records) or isinstance(records[0], Example):
        return list(records)
    return task.encode(records).examples


def total_steps(num_records: int, settings: TrainSettings) -> int:
    """Optimizer steps of a run: `max_steps`, or whole epochs, whichever ends first."""
    per_epoch = math.ceil(
        num_records / (settings.batch_size * settings.gradient_accumulation_steps)
    )
    limits = [settings.max_steps] if settings.max_steps else []
    if settings.epochs:
        limits.append(math.ceil(settings.epochs * per_epoch))
    return min(limits)


def _open_folder(path: Path, resume: bool) -> RunFolder:
    return RunFolder.open(path) if resume else RunFolder.create(path)


def _courses(
    model: nn.Module, task: Task, data: Mapping, eval_data: Any, settings: TrainSettings
) -> list[Course]:
    if not data:
        raise ConfigError("there is nothing to train", expected="{adapter: records}")
    held_out = eval_data if isinstance(eval_data, Mapping) else dict.fromkeys(data, eval_data or ())
    by_name = {find(model, a).name: records for a, records in held_out.items()}
    courses = []
    for key, records in data.items():
        adapter = find(model, key)
        if not len(records):
            raise DataError(
                f"there are no records for adapter {adapter.name!r}", expected="at least one"
            )
        examples = _encoded(task, records)
        trainee = Trainee(adapter, settings, total_steps(len(examples), settings))
        courses.append(Course(trainee, examples, _encoded(task, by_name.get(adapter.name, ()))))
    return courses


class _Run:
    """The state of `train` between its first and its last step."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        courses: list[Course],
        settings: TrainSettings,
        folder: RunFolder,
        make_recorder: MakeRecorder | None,
        evaluator: Evaluator | None,
        manifest: dict[str, Any],
    ) -> None:
        self.model, self.task, self.courses, self.settings = model, task, courses, settings
        self.folder, self.evaluator = folder, evaluator
        self.make_recorder, self.manifest = make_recorder, manifest
        self.recorder: Recorder | None = None
        self.turn = 0
        self.windows = {c.name: _Window() for c in courses}
        self.last_loss: dict[str, float] = {}

    def prepare(self, resume: bool) -> None:
        checkpoint.clean(self.folder.checkpoints)
        notes: list[str] = []
        if resume:
            state, notes = checkpoint.load(
                self.folder.checkpoints, self._identity(), setting=_setting()
            )
            if state is None:
                notes.append("there is no whole checkpoint: starting from the beginning")
            else:
                self._restore(state)
                notes.append(f"going on from step {state.step}")
        resumed = self.turn if resume else None
        make = self.make_recorder or (lambda step: RunRecorder(self.folder, resumed_step=step))
        self.recorder = make(resumed)
        self.recorder.start({**self._manifest(), **self.manifest})
        for note in [*notes, *self.task.notes]:
            self.recorder.event("info", note)

    def go(self) -> TrainReport:
        engine = Engine(
            self.model, self.task, gradient_checkpointing=self.settings.gradient_checkpointing
        )
        began = time.monotonic()
        try:
            with _signals() as stop:
                while any(not c.done for c in self.courses):
                    self._turn(engine)
                    if stop.asked and any(not c.done for c in self.courses):
                        self._save()
                        raise stop.error(self.folder.path)
        except Interrupted:
            self._finish({"status": "interrupted"})
            raise
        except LoricaError as error:
            self._finish({"status": "failed", "error": str(error)})
            raise
        return self._end(time.monotonic() - began)

    def _turn(self, engine: Engine) -> None:
        working = [c for c in self.courses if not c.done]
        results = engine.step([c.trainee for c in working], [c.micro_batches() for c in working])
        self.turn += 1
        for course, result in zip(working, results, strict=True):
            course.tokens += result.tokens
            course.trained_tokens += result.trained_tokens
            self.windows[course.name].add(result)
            evaluated = self._evaluate(course) if self._due(course, self.eval_steps(course)) else {}
            if evaluated or self._due(course, self.settings.logging_steps):
                self._log(course, evaluated)
        if any(not c.done for c in self.courses) and self.turn % self.save_steps == 0:
            self._save()

    def eval_steps(self, course: Course) -> int:
        """Steps between evaluations: as set, or an epoch."""
        return self.settings.eval_steps or course.steps_per_epoch

    @property
    def save_steps(self) -> int:
        """Turns between checkpoints: as set, or as evaluations come."""
        return self.settings.save_steps or min(self.eval_steps(c) for c in self.courses)

    def _due(self, course: Course, every: int | None) -> bool:
        return (
            bool(every and course.trainee.step % every == 0)
            or course.trainee.step == course.trainee.total
        )

    def _evaluate(self, course: Course) -> dict[str, float]:
        if not course.held_out:
            return {}
        self.model.eval()
        with activate(self.model, course.trainee.adapter):
            found = {
                "eval_loss": mean_loss(self.model, self.task, course.held_out, self._eval_batch)
            }
            if self.evaluator is not None:
                found |= {
                    f"eval_{k}": v
                    for k, v in self.evaluator(self.model, course.trainee.adapter).items()
                }
        course.eval_loss = found["eval_loss"]
        if course.eval_loss < course.best_loss:
            course.best_loss, course.best_step, course.stale = (
                course.eval_loss,
                course.trainee.step,
                0,
            )
            course.best = {
                n: p.detach().clone() for n, p in course.trainee.adapter.named_parameters()
            }
            self._event(
                "best",
                f"{course.name}: best so far, step {course.best_step}, eval loss {course.best_loss:.4f}",
            )
            return found
        course.stale += 1
        patience = self.settings.early_stopping_patience
        if patience and course.stale >= patience:
            course.stopped = f"the evaluation loss has not fallen for {patience} evaluations (best at step {course.best_step})"
            self._event("info", f"{course.name}: {course.stopped}")
        return found

    @property
    def _eval_batch(self) -> int:
        return self.settings.eval_batch_size or self.settings.batch_size

    def _log(self, course: Course, evaluated: dict[str, float]) -> None:
        window = self.windows[course.name]
        self.windows[course.name] = _Window()
        self.last_loss[course.name] = window.loss
        assert self.recorder is not None
        self.recorder.step(
            {
                "step": course.trainee.step,
                "epoch": round(course.trainee.step / course.steps_per_epoch, 4),
                "adapter": course.name,
                "loss": window.loss,
                **evaluated,
                "learning_rate": window.learning_rate,
                "grad_norm": window.grad_norm,
                "tokens": course.tokens,
                "tokens_per_second": window.rate,
                "memory_bytes": memory_bytes(),
            }
        )

    def _event(self, kind: str, text: str) -> None:
        assert self.recorder is not None
        self.recorder.event(kind, text)

    # --- checkpoints ----------------------------------------------------------------------------------------

    def _save(self) -> None:
        state = checkpoint.State(self.turn, self._identity(), _setting())
        for c in self.courses:
            state.counters[c.name] = {
                "step": c.trainee.step,
                "tokens": c.tokens,
                "trained_tokens": c.trained_tokens,
                "best_loss": c.best_loss if math.isfinite(c.best_loss) else None,
                "best_step": c.best_step,
                "stale": c.stale,
                "stopped": c.stopped,
                "eval_loss": c.eval_loss,
                "window": self.windows[c.name].counters(),
            }
            named = dict(c.trainee.adapter.named_parameters())
            state.adapters[c.name] = dict(named)
            state.optimizers[c.name] = _moments(c.trainee.optimizer, named)
            if c.best:
                state.best[c.name] = c.best
        checkpoint.save(self.folder.checkpoints, state, keep=self.settings.save_total_limit or 2)
        self._event("checkpoint", f"checkpoint of step {self.turn} written")

    def _restore(self, state: checkpoint.State) -> None:
        self.turn = state.step
        for c in self.courses:
            counters = state.counters[c.name]
            named = dict(c.trainee.adapter.named_parameters())
            with torch.no_grad():
                for key, tensor in state.adapters[c.name].items():
                    named[key].copy_(tensor)
            _set_moments(c.trainee.optimizer, named, state.optimizers[c.name])
            c.trainee.step, c.tokens, c.trained_tokens = (
                counters[k] for k in ("step", "tokens", "trained_tokens")
            )
            c.best_loss = math.inf if counters["best_loss"] is None else counters["best_loss"]
            c.best_step, c.stale, c.stopped = (
                counters["best_step"],
                counters["stale"],
                counters["stopped"],
            )
            c.eval_loss = counters["eval_loss"]
            c.best = {k: t.to(named[k].device) for k, t in state.best.get(c.name, {}).items()}
            self.windows[c.name] = _Window.of(counters["window"])

    def _identity(self) -> dict[str, str]:
        base = base_of(self.model)
        kept = {k: v for k, v in asdict_settings(self.settings).items() if k not in COSMETIC}
        identity = {
            "base": base.digest if base else type(self.model).__name__,
            "task": self.task.kind,
        }
        identity |= {
            f"settings.{k}": json.dumps(v, sort_keys=True, default=str) for k, v in kept.items()
        }
        for c in self.courses:
            identity[f"adapter {c.name}"] = json.dumps(
                asdict(c.trainee.adapter.method), sort_keys=True, default=str
            )
            identity[f"data of {c.name}"] = _digest(c.examples)
            identity[f"evaluation data of {c.name}"] = _digest(c.held_out)
        return identity

    # --- the end --------------------------------------------------------------------------------------------

    def _end(self, seconds: float) -> TrainReport:
        folders = {}
        for c in self.courses:
            if self.settings.keep_best and c.best:
                with torch.no_grad():
                    for key, parameter in c.trainee.adapter.named_parameters():
                        parameter.copy_(c.best[key])
            target = self.folder.adapter(None if len(self.courses) == 1 else c.name)
            folders[c.name] = save_adapter(
                c.trainee.adapter, target, overwrite=True, provenance=self._provenance(c)
            )
        tokens = sum(c.tokens for c in self.courses)
        kept = {
            c.name: c.best_loss if self.settings.keep_best and c.best else c.eval_loss
            for c in self.courses
        }
        report = TrainReport(
            steps={c.name: c.trainee.step for c in self.courses},
            loss=self.last_loss,
            eval_loss=kept,
            best_step={c.name: c.best_step or c.trainee.step for c in self.courses},
            stopped={c.name: c.stopped for c in self.courses},
            folders=folders,
            seconds=seconds,
            tokens_per_second=tokens / seconds if seconds else 0.0,
            peak_memory_bytes=memory_bytes(),
        )
        resources = {
            "seconds": seconds,
            "tokens_per_second": report.tokens_per_second,
            "peak_memory_bytes": report.peak_memory_bytes,
            "num_threads": torch.get_num_threads(),
            "device": str(next(self.model.parameters()).device),
            "adapter_bytes": sum(
                f.stat().st_size for p in folders.values() for f in p.glob("*.safetensors")
            ),
        }
        report.resources.update(resources)
        self._finish({"status": "finished", "resources": resources, "training": report.summary()})
        return report

    def _provenance(self, course: Course) -> dict[str, Any]:
        """Where an adapter comes from, and how its base must be asked."""
        return {
            "task": self.task.facts(),
            "versions": versions(),
            "data_digest": _digest(course.examples),
            "steps": course.trainee.step,
            "settings": asdict_settings(self.settings),
        }

    def _finish(self, summary: dict) -> None:
        if self.make_recorder is None or summary["status"] != "finished":
            assert self.recorder is not None
            self.recorder.finish(summary)

    def _manifest(self) -> dict:
        base = base_of(self.model)
        first = self.courses[0]
        return {
            "versions": versions(),
            "base": {
                "name": base.name if base else type(self.model).__name__,
                "digest": base.digest if base else None,
                "num_parameters": sum(p.numel() for p in self.model.parameters()),
                "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
                "architecture": type(self.model).__name__,
            },
            "task": self.task.kind,
            "seed": self.settings.seed,
            "method": {
                "kind": first.trainee.adapter.method.kind,
                **asdict(first.trainee.adapter.method),
            },
            "adapters": {
                c.name: {
                    "num_parameters": c.trainee.adapter.num_parameters,
                    "num_places": len(c.trainee.adapter.slots),
                    "reason": c.trainee.adapter.reason,
                    "path": str(self.folder.adapter(None if len(self.courses) == 1 else c.name)),
                }
                for c in self.courses
            },
            "plan": {
                "max_steps": max(c.trainee.total for c in self.courses),
                "epochs": max(c.trainee.total / c.steps_per_epoch for c in self.courses),
                "batch_size": first.per_step,
            },
        }


@dataclass
class _Window:
    """What happened since the last logged step of one adapter."""

    nll: float = 0.0
    trained_tokens: int = 0
    tokens: int = 0
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def add(self, result: StepResult) -> None:
        self.nll += result.loss * result.trained_tokens
        self.trained_tokens += result.trained_tokens
        self.tokens += result.tokens
        self.learning_rate, self.grad_norm = result.learning_rate, result.grad_norm

    @property
    def loss(self) -> float:
        return self.nll / self.trained_tokens if self.trained_tokens else math.nan

    @property
    def rate(self) -> float:
        return self.tokens / max(1e-9, time.monotonic() - self.began)

    def counters(self) -> dict:
        return {k: v for k, v in asdict(self).items() if k != "began"}

    @classmethod
    def of(cls, counters: dict) -> _Window:
        return cls(**counters)


@torch.no_grad()
def mean_loss(model: nn.Module, task: Task, examples: Sequence[Example], batch_size: int) -> float:
    """Mean negative log-likelihood (nats) per trained token of the model as it is activated."""
    total, count = 0.0, 0
    for chosen in by_length([len(e.input_ids) for e in examples], batch_size):
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


def asdict_settings(settings: TrainSettings) -> dict[str, Any]:
    """Settings as plain values."""
    return settings.model_dump(mode="json")


def _setting() -> dict[str, str]:
    return {
        "number of threads": str(torch.get_num_threads()),
        "version of torch": torch.__version__,
    }


def _digest(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([list(example.input_ids), list(example.labels)]).encode())
    return digest.hexdigest()


def _moments(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's tensors, by name of the parameter and of the moment."""
    return {
        f"{name}|{key}": value
        for name, p in named.items()
        for key, value in optimizer.state.get(p, {}).items()
    }


def _set_moments(
    optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    for full, value in tensors.items():
        name, _, key = full.rpartition("|")
        parameter = named[name]
        optimizer.state[parameter][key] = value.to(
            "cpu" if key == "step" and not parameter.is_cuda else parameter.device
        )


class _Stop:
    """Whether somebody asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.asked: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:  # asked twice: now
            raise KeyboardInterrupt
        self.asked = number

    def error(self, folder: Path) -> Interrupted:
        error = Interrupted(
            f"stopped by {signal.Signals(self.asked or signal.SIGINT).name}; the state was saved",
            mend=f"go on with: lorica train --resume {folder}",
        )
        error.exit_code = 128 + (self.asked or signal.SIGINT)
        return error


@contextmanager
def _signals() -> Iterator[_Stop]:
    """The first SIGINT or SIGTERM lets the step end and saves; the second stops at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {
        number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
