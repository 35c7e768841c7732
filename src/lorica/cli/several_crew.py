"""A run with `adapters:` by several processes: `torchrun ... -m lorica train run.yaml`.

Each loads the base and takes a share of the adapters, which know nothing of each other. What they
become are the bits of one process, or of a run alone. When all are written, the first process (or
another one where that is gone) scores them and writes the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorica.attach.attach import detach
from lorica.cli.crew import Together, mark, wait, whole
from lorica.cli.prepared import Prepared
from lorica.cli.ranks import Ranks
from lorica.cli.run import Outcome, finished
from lorica.cli.several import (
    Several,
    SeveralRun,
    about,
    attached,
    begin,
    data_of,
    prepare_several,
    refuse_failed,
)
from lorica.cli.voice import Voice
from lorica.config import Resolved
from lorica.errors import NonFiniteError
from lorica.files.adapter import load_adapter
from lorica.records.crew import LOOK_EVERY, Crew
from lorica.records.folder import RunFolder
from lorica.records.read import read_manifest
from lorica.records.write import Recorder, merged
from lorica.train.agreement import of_the_run
from lorica.train.director import Evaluation, Newcomer
from lorica.train.identity import identity
from lorica.train.loop import train
from lorica.train.plan import courses_of


def execute_several_together(
    settings: Resolved,
    found: Ranks,
    *,
    resume: Path | None,
    discard: bool,
    quiet: bool,
    json: bool,
    ignore_memory: bool,
) -> Outcome | None:
    """What one of several processes does for a run; arguments as of `execute_several`.

    Returns:
        of the process that wrote the end of the run; None of the others.
    """
    began = time.monotonic()
    how: dict[str, Any] = {"resume": resume, "discard": discard, "json": json, "quiet": quiet}
    together = Together.of(settings, found, "train", **how)
    if resume is not None and (outcome := finished(resume, settings, together.voice)):
        if not found.first:
            return None
        refuse_failed(resume)
        return outcome
    several = together.prepare(settings, lambda voice: prepare_several(settings, voice))
    what = _identity(several)
    for part in several.parts.values():
        detach(part.model, part.adapter)

    def work(crew: Crew) -> _Work:
        with crew.locked():
            crew.agree(what)
        own = _Work(several, crew, together.voice)
        own.go()
        return own

    def end(work: _Work, folder: RunFolder) -> Outcome:
        return work.end(folder, began)

    return together.see_through(lambda folder: begin(folder, several.settings), work, end)


def _identity(several: Several) -> dict[str, str]:
    """What a checkpoint of the run by one process would be known by."""
    first, (data, eval_data, settings) = several.first, data_of(several.parts)
    courses, _ = courses_of(first.model, first.task, data, eval_data, settings)
    return identity(first.model, first.task, courses, of_the_run(settings))


@dataclass
class Share:
    """The adapters that a process trains in a stretch of work: a director who lets everybody train
    to the end, and hands adapters on to processes that have fewer.

    Attributes:
        parts: the adapters, as they are attached.
        left_over: names the adapters of the run that are not written yet and have not failed.
    """

    parts: dict[str, Prepared]
    crew: Crew
    folder: RunFolder
    left_over: Callable[[], Sequence[str]]
    looked: float = field(default_factory=time.monotonic)

    @property
    def state(self) -> dict[str, Any]:
        """Nothing is to be remembered."""
        return {}

    def judge(self, evaluation: Evaluation) -> None:
        """Whoever trains goes on."""

    def newcomers(self, standing: Mapping[str, str | None]) -> Sequence[Newcomer]:
        """Nobody joins."""
        return []

    def again(self, name: str) -> Newcomer:
        """Never asked: nobody has joined."""
        raise AssertionError(name)

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing is to be done."""

    @property
    def states(self) -> Path:
        """Where the states of adapters lie, for whoever goes on with them."""
        return self.crew.states

    def leaving(self, working: Sequence[str]) -> Sequence[str]:
        """The last adapters of the list, where another process has less to do: looked at now and
        then.
        """
        if len(working) < 2 or time.monotonic() - self.looked < LOOK_EVERY:
            return []
        self.looked = time.monotonic()
        ended = self.parts.keys() - {*working}
        with self.crew.locked():
            active = [name for name in self.left_over() if name not in ended]
            surplus = -self.crew.balance(self.folder, active)
        return working[-surplus:] if surplus > 0 else []

    def left(self, name: str) -> None:
        """An adapter whose state is written belongs to nobody."""
        part = self.parts.pop(name)
        detach(part.model, part.adapter)
        with self.crew.locked():
            self.crew.release(name)


@dataclass
class _Work:
    """The share of one process."""

    several: Several
    crew: Crew
    voice: Voice

    @property
    def names(self) -> list[str]:
        return [*self.several.parts]

    def go(self) -> None:
        """Train what there is, until all adapters are written or have failed."""
        share = self.crew.share(len(self.names))
        if self.crew.size > 1:
            self.voice.say(f"{self.crew.size} processes, of which each trains {share} adapters")
        while True:
            with self.crew.locked():
                if self.crew.is_over:
                    return
                left, owners = self._left_over(), self.crew.owners()
                if not left:
                    return
                free = [n for n in left if n not in owners or self.crew.is_lost(n, owners[n])]
                folder = self.crew.begin() if free else None
                if folder is not None:
                    free = free[: max(1, min(share, self.crew.balance(folder, left)))]
                    self.crew.take(free, folder)
            if folder is None:
                wait()
                continue
            with folder:
                self._stretch(folder, free)

    def _left_over(self) -> list[str]:
        owners = self.crew.owners()
        return [name for name in self.names if not self._is_done(name, owners)]

    def _is_done(self, name: str, owners: Mapping[str, Path]) -> bool:
        owner = owners.get(name)
        failed = self.crew.training(owner).get("failed", {})
        return bool(failed.get(name)) or self.crew.is_written(name, owner)

    def _stretch(self, folder: RunFolder, names: Sequence[str]) -> None:
        """Train some of the adapters to their end."""
        model = self.several.first.model
        parts: dict[str, Prepared] = {}
        for name in names:
            own = self.several.parts[name]
            parts[name] = replace(own, adapter=attached(name, own.settings, model)[0])
        try:
            self._train(folder, parts)
        except NonFiniteError as error:
            if not error.failed:
                raise
            # all of them; the others know nothing of it
            mark(folder, {"training": {"failed": error.failed, "steps": error.steps}})
            self.crew.forget(error.failed)
        finally:
            for part in parts.values():
                detach(model, part.adapter)

    def _train(self, folder: RunFolder, parts: dict[str, Prepared]) -> None:
        def recorder(step: int | None) -> Recorder:
            return self.voice.recorder(folder, self.several.settings.to_yaml(), step)

        data, eval_data, settings = data_of(parts)
        first = self.several.first
        report = train(
            first.model,
            data,
            settings,
            output_dir=folder,
            eval_data=eval_data,
            task=first.task,
            recorder=recorder,
            manifest=about(parts, self.crew.path),
            director=(own := Share(parts, self.crew, folder, self._left_over)),
            relay=own,
        )
        assert self.voice.writer is not None
        self.voice.writer.finish({"status": "finished", **report.outcome()})
        self.crew.forget(report.steps)

    def end(self, folder: RunFolder, began: float) -> Outcome:
        """Score the adapters of all, and write the run.

        Raises:
            NonFiniteError: adapters failed; the others are whole, scored and written.
        """
        head, report = whole(self.crew, self.names, self.crew.size)
        self.crew.write_lines(self.names, {})
        model, parts = self.several.first.model, dict(self.several.parts)
        for name, lies in report.folders.items():
            parts[name] = replace(parts[name], adapter=load_adapter(model, lies, name=name))
        several = Several(self.several.settings, parts)
        known = read_manifest(folder.manifest)
        head |= {key: known[key] for key in ("started", "processes")}
        recorder = self.voice.writing(folder, several.settings.to_yaml())
        recorder.start(merged(head, about(parts, folder.path)))
        run = SeveralRun(several, folder, self.voice, began, recorder)
        try:
            return run.end(report)
        finally:
            if read_manifest(folder.manifest).get("status") == "finished":
                with self.crew.locked():
                    self.crew.disband()
