"""A training run from end to end: what `lorica train` and `lorica demo` do.

Nothing is written before data, base, targets and settings have been found to fit. From then on the
folder is a run: wherever it is stopped, `lorica train --resume` goes on.
"""

from __future__ import annotations

import gc
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorica import __version__
from lorica.base.request import IMAGES
from lorica.cli.anchoring import anchored
from lorica.cli.encoding import own_template
from lorica.cli.images import picture_samples
from lorica.cli.judge import predictions, samples, tell_of_chance
from lorica.cli.manifest import manifest, marked, trial_of
from lorica.cli.opening import adapter_facts
from lorica.cli.prepare import prepare
from lorica.cli.prepared import Prepared
from lorica.cli.start import ADAPTER
from lorica.cli.voice import Voice
from lorica.config import Resolved, load_yaml, resolve
from lorica.errors import ConfigError, Interrupted, LoricaError
from lorica.files.adapter import CONFIG
from lorica.files.safetensors_file import write_tensors
from lorica.methods import WORDS
from lorica.records.atomic import write_file
from lorica.records.card import write_card
from lorica.records.folder import (
    CHECKPOINTS,
    RELEVANCE_SCORES,
    RunFolder,
    how_to_resume,
    json_text,
    now,
)
from lorica.records.read import read_manifest
from lorica.records.signals import signals_heard
from lorica.records.write import Recorder, write_end
from lorica.tasks.task import Prediction
from lorica.train.loop import train
from lorica.train.report import TrainReport
from lorica.train.signals import Stop

if TYPE_CHECKING:  # imported late: it brings all of scipy
    from lorica.evaluate.compare import Comparison


@dataclass
class Outcome:
    """What a run leaves for whoever started it."""

    folder: Path
    scores: dict[str, Comparison] = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)


def execute(
    settings: Resolved,
    *,
    resume: Path | None = None,
    discard: bool = False,
    json: bool = False,
    quiet: bool = False,
    ignore_memory: bool = False,
) -> Outcome:
    """Run everything that `lorica train` does.

    Args:
        settings: of the run.
        resume: the run folder to go on with.
        discard: throw away an earlier run in the output folder.
        json, quiet: how the display speaks.
        ignore_memory: begin although the memory of the machine will not do.
    """
    began = time.monotonic()
    gc.freeze()  # collecting among half a million objects of torch and transformers takes 0.1 s
    voice = Voice(json=json, quiet=quiet)
    if resume is not None and (outcome := finished(resume, settings, voice)):
        return outcome
    path = resume or Path(settings.run.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        with signals_raise(), ExitStack() as held:
            if resume:  # the lock first: two must not load a model for the run of one
                folder = held.enter_context(RunFolder.open(path))
            else:
                RunFolder.check(path, replace=discard)
            if settings.run.threads:
                torch.set_num_threads(settings.run.threads)
            prepared = prepare(settings, voice, ignore_memory=ignore_memory)
            prepared.settings = anchored(prepared.settings)
            if prepared.task.kind == "causal-lm":
                shown = _example(prepared)
                voice.say(f"the first of them, with what is trained in brackets: {shown}")
            if not resume:
                folder = held.enter_context(RunFolder.create(path, replace=discard))
            return _Run(prepared, folder, voice, began).go(resume=resume is not None)
    except Signal as asked:
        voice.display.work(None)
        raise stopped(path, asked.number) from None


def stopped(path: Path, number: int) -> LoricaError:
    """What is told when a signal came while nothing was half done."""
    if any((path / CHECKPOINTS).glob("step-*")):
        stop = Stop()
        stop.handle(number, None)
        return stop.error(path, saved=True)
    begun = (path / "run.json").is_file()
    state = "between steps: none is lost" if begun else "before the run began: nothing was written"
    error = Interrupted(
        f"stopped by {signal.Signals(number).name} {state}",
        mend=f"go on with: {how_to_resume(path)}" if begun else "start the same command again",
    )
    error.exit_code = 128 + number  # type: ignore[misc]
    return error


class _Run:
    """A run whose folder is held."""

    def __init__(self, prepared: Prepared, folder: RunFolder, voice: Voice, began: float) -> None:
        self.prepared, self.folder, self.voice, self.began = prepared, folder, voice, began
        self.recorder: Recorder | None = None

    def go(self, *, resume: bool) -> Outcome:
        """Score the base, train, score the tuned model, compare, report."""
        if not resume:
            _begin(self.folder, self.prepared)
        with self._resumable():  # a resumed run scores the base when it has trained
            before = [] if resume else self._base()
        report = self._train(resume)
        from lorica.evaluate.compare import compare

        with self._resumable():
            if resume:
                before = self._base()
            after = self._predict(tuned=True)
            scores = compare(before, after, self.prepared.metrics) if before else {}
            run = self.prepared.settings.run
            if self.prepared.task.kind == IMAGES:
                shown = picture_samples(self.prepared, self.folder, self.voice)
            else:
                shown = samples(before, after, self.prepared.task, run.num_samples)
            self.folder.write_samples(shown)
            complete(self.prepared, self.folder.adapter())
        self._finish(scores, report)
        return Outcome(self.folder.path, scores, shown)

    def _base(self) -> list[Prediction]:
        found = self._predict(tuned=False)
        if found:
            from lorica.evaluate.metrics import check_inputs, find_metrics

            check_inputs(find_metrics(self.prepared.metrics), found)  # before hours of training
            tell_of_chance(self.prepared.base, self.voice)
        return found

    def _predict(self, *, tuned: bool) -> list[Prediction]:
        own = self.prepared
        return predictions(
            own.model,
            own.adapter if tuned else None,
            own.task,
            own.material.test,
            self.voice,
            generate=own.material.generates,
        )

    def _train(self, resume: bool) -> TrainReport:
        own = self.prepared

        def recorder(step: int | None) -> Recorder:
            self.recorder = self.voice.recorder(self.folder, own.settings.to_yaml(), step)
            return self.recorder

        return train(
            own.model,
            {own.adapter: own.examples},
            own.settings.train,
            output_dir=self.folder,
            eval_data=own.held_out,
            task=own.task,
            recorder=recorder,
            manifest=manifest(own, self.folder.path),
            resume=resume,
        )

    def _finish(self, scores: dict[str, Comparison], report: TrainReport) -> None:
        planned = self.prepared.memory
        summary = {
            "status": "finished",
            "scores": {name: asdict(found) for name, found in scores.items()},
            **report.outcome(),
            "resources": {
                **report.resources,
                "total_seconds": time.monotonic() - self.began,
                **({"planned_memory_bytes": planned["total"]} if planned else {}),
            },
        }
        assert self.voice.writer is not None
        self.voice.writer.finish(summary)
        dress(self.folder.path)
        self.voice.display.finish(summary)

    def _resumable(self) -> AbstractContextManager[None]:
        return resumable(self.folder, self.voice, lambda: self.recorder)


@contextmanager
def resumable(
    folder: RunFolder, voice: Voice, recorder: Callable[[], Recorder | None]
) -> Iterator[None]:
    """What is stopped or fails in here leaves a run that can be gone on with.

    Args:
        recorder: that of the run, where it has one by then.
    """

    def mark(outcome: dict[str, Any]) -> None:
        if (writer := recorder()) is not None:
            writer.finish(outcome)
            return
        voice.display.work(None)
        with suppress(OSError):  # what is wrong with the disk is told by who came here
            write_end(folder, outcome)

    try:
        with signals_raise():
            yield
    except Signal as asked:
        mark({"status": "interrupted"})
        raise stopped(folder.path, asked.number) from None
    except BaseException as error:
        mark({"status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise


class Signal(KeyboardInterrupt):
    """A signal that asks the process to stop."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)


@contextmanager
def signals_raise() -> Iterator[None]:
    """While models are scored nothing is half done: the first signal stops at once."""

    def stop(number: int, frame: object) -> None:
        raise Signal(number)

    with signals_heard(stop):
        yield


def complete(prepared: Prepared, folder: Path) -> None:
    """The tokenizer beside the adapter, with the chat template that it was trained with; not where
    texts are captions, which the pipeline has its own tokenizers for.
    """
    if prepared.task.kind == IMAGES:
        return
    tokenizer = prepared.task.tokenizer
    if source := own_template(prepared):
        tokenizer.chat_template = source
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizer's own writer raises a bare Exception
        if not (isinstance(error, OSError) or "os error" in str(error)):
            raise
        raise LoricaError(
            f"the tokenizer could not be written in {folder}: {error}",
            mend="free space and go on with the run: lorica train --resume FOLDER",
        ) from error


def _begin(folder: RunFolder, prepared: Prepared) -> None:
    """The least that makes the folder a run, so that it can be gone on with from here; and what is
    not found out again then.
    """
    write_file(folder.config, prepared.settings.to_yaml())
    head = {"lorica": __version__, "status": "running", "started": now()}
    trial = trial_of(prepared, folder.path)
    found = {"trial": trial} if trial else {}
    write_file(folder.manifest, json_text({**head, "run": {"path": str(folder.path)}, **found}))
    if prepared.relevance is not None:
        folder.write_relevance(prepared.relevance.as_dict())
        if prepared.relevance.groups:
            write_tensors(folder.path / RELEVANCE_SCORES, prepared.relevance.groups)


def dress(path: Path) -> None:
    """Model card and page, which say what run.json says, and the card what the adapter does."""
    from lorica.records.report import write_report

    manifest = read_manifest(path / "run.json")
    for name, folder in adapters_of(path).items():
        own = manifest.get("adapters", {}).get(name, {})
        facts = adapter_facts(folder)
        card = {**manifest, "settings": facts.get("settings", {})}
        card |= {key: own[key] for key in ("data", "method") if key in own}
        write_card(folder, card, adapter=name)
    write_report(path)


def adapters_of(path: Path) -> dict[str, Path]:
    """The adapters that a run has written, by name."""
    if (path / "adapter").is_dir():
        return {ADAPTER: path / "adapter"}
    return {folder.parent.name: folder.parent for folder in path.glob(f"adapters/*/{CONFIG}")}


def finished(path: Path, settings: Resolved, voice: Voice) -> Outcome | None:
    """Says so where a run is finished already, and writes its page where that is missing.

    Args:
        settings: those of the run, with what was asked for now.

    Raises:
        ConfigError: there is no run in `path`; or settings are asked for that it did not have.
    """
    if not (path / "run.json").is_file():
        raise ConfigError(
            f"{path} holds no run to go on with",
            expected="a folder with run.json, written by lorica train",
            mend="check the path, or start a run without --resume",
        )
    found = read_manifest(path / "run.json")
    if found.get("status") != "finished":
        return None
    _check_unchanged(path, settings)
    cards = [folder / "README.md" for folder in adapters_of(path).values()]
    if not all(file.is_file() for file in (path / "report.html", *cards)):
        dress(path)
    steps = max(found.get("training", {}).get("steps", {}).values(), default=0)
    voice.say(f"the run in {path} is finished ({steps:,} steps, ended {found.get('ended', '?')})")
    voice.say(f"for a longer one: {_another(path)} --max-steps N")
    return Outcome(path)


def _check_unchanged(path: Path, settings: Resolved) -> None:
    """Raises ConfigError for settings that a finished run would ignore."""
    wanted = anchored(settings).values
    had = anchored(resolve(load_yaml(path / "config.yaml"), methods=WORDS)).values
    ignored = [
        f"{settings.origins[key]}: {key} is {value!r}, and the run had {had.get(key)!r}"
        for key, value in wanted.items()
        if value != had.get(key) and key != "output_dir"
    ]
    if ignored:
        raise ConfigError(
            f"the run in {path} is finished; these settings would be ignored",
            problems=ignored,
            mend=f"start another run with them: {_another(path)} ...",
        )


def _another(path: Path) -> str:
    """The command for another run with the settings of this one."""
    line = ["lorica", "train", os.path.join(path, "config.yaml"), "--output-dir", "ANOTHER"]
    return shlex.join(line)


def _example(prepared: Prepared) -> str:
    """The first record in one line; long stretches without their middle."""
    parts = []
    for text, trained in marked(prepared.task, prepared.examples[0]):
        if len(text) > 120:
            text = f"{text[:50]} ... {text[-60:]}"
        parts.append(f"[{text}]" if trained else text)
    return "".join(parts).replace("\n", "⏎")
