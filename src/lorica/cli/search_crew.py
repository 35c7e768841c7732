"""A search by several processes: `torchrun ... -m lorica search run.yaml`.

Each loads the base and takes a share of the candidates. The answer is that of one process which
trains as many at once as all of them do together, to the last bit on a CPU: see `search.schedule`
for who goes on, and `search.member` for who trains what. The folder of the run is written by the
first process, or by another one where that is gone.
"""

from __future__ import annotations

import gc
import json as jsonlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorica.attach.attach import detach
from lorica.cli.candidates import Candidates
from lorica.cli.crew import Together, wait, whole
from lorica.cli.manifest import manifest
from lorica.cli.ranks import Ranks, beside
from lorica.cli.search_prepare import Ground, prepare_search
from lorica.cli.search_run import Search, begin, closing_lines, finished, prepared_of
from lorica.cli.voice import Voice
from lorica.config import Resolved
from lorica.errors import ConfigError, NonFiniteError
from lorica.files.adapter import load_adapter
from lorica.records.crew import Crew
from lorica.records.folder import STUDY, RunFolder
from lorica.records.read import read_manifest
from lorica.records.write import Recorder, merged
from lorica.search.entry import Entry
from lorica.search.field import Course, Field
from lorica.search.member import Member, lost
from lorica.search.schedule import Schedule, training
from lorica.search.study import Study, import_optuna
from lorica.train.loop import train
from lorica.train.report import TrainReport


def execute_search_together(
    settings: Resolved,
    found: Ranks,
    *,
    resume: Path | None = None,
    discard: bool = False,
    json: bool = False,
    quiet: bool = False,
    ignore_memory: bool = False,
) -> Path:
    """What one of several processes does for a search; arguments as of `execute_search`.

    Args:
        found: which one it is.
    """
    began = time.monotonic()
    gc.freeze()
    how: dict[str, Any] = {"resume": resume, "discard": discard, "json": json, "quiet": quiet}
    together = Together.of(settings, found, "search", **how)
    candidates = Candidates(settings)
    _refuse_storage(candidates)
    import_optuna()
    path = together.path
    if resume is not None and finished(path, together.voice):
        return path
    sizes = {"processes": found.size, "beside": beside(found)}
    ground = together.prepare(
        settings,
        lambda voice: prepare_search(candidates, voice, ignore_memory=ignore_memory, **sizes),
    )

    def work(crew: Crew) -> _Work:
        own = _Work(ground, crew, together.voice)
        own.go()
        return own

    def end(work: _Work, folder: RunFolder) -> None:
        _show(path, work.answer(folder, began), json=json, quiet=quiet)

    together.see_through(lambda folder: begin(folder, ground.settings), work, end)
    return path


def _refuse_storage(candidates: Candidates) -> None:
    if candidates.space.how.storage is not None:
        raise ConfigError(
            "storage is for searches on several machines, and processes of one machine have their "
            "study in the folder that they share",
            mend="take storage out, or start one process for each folder, without torchrun",
        )


def _show(path: Path, answer: dict[str, Any], *, json: bool, quiet: bool) -> None:
    if json:
        print(jsonlib.dumps({"type": "answer", "folder": str(path), **answer}, ensure_ascii=False))
    else:
        print("\n".join(closing_lines(path, answer, quiet=quiet)))


@dataclass
class _Work:
    """The share of one process."""

    ground: Ground
    crew: Crew
    voice: Voice
    study: Study = field(init=False)
    schedule: Schedule = field(init=False)

    def __post_init__(self) -> None:
        ground, crew = self.ground, self.crew
        with crew.locked():  # whoever comes first makes the study
            self.study = Study(
                str(crew.path / STUDY),
                ground.space,
                seed=ground.settings.train.seed,
                identity=ground.identity(),
                run=str(crew.path),
            )
            at_once = self.study.agree("at_once", ground.at_once)
        ground.at_once = at_once
        self.schedule = Schedule(self.study, at_once, ground.every, ground.total, ground.rungs)

    def go(self) -> None:
        """Train what there is, until all candidates of the search have ended and are written."""
        self.ground.voice_plan(self.voice)
        share = self.crew.share(self.schedule.at_once)
        if self.crew.size > 1:
            self.voice.say(f"{self.crew.size} processes, of which each trains {share} at once")
        if self.ground.room is not None and self.ground.room < share:
            self.voice.say(f"this process takes {self.ground.room} at once: so many fit")
        while True:
            with self.crew.locked():
                entries = self.schedule.advance()
                if self._is_over(entries):
                    return
                folder = self.crew.begin() if self._has_work(entries) else None
            if folder is None:
                wait()
                continue
            with folder:
                self._stretch(folder)

    def _is_over(self, entries: Sequence[Entry]) -> bool:
        owners = self.crew.owners()
        ended = [e.name for e in entries if e.outcome in ("finished", "cut")]
        unwritten = [name for name in ended if not self.crew.is_written(name, owners.get(name))]
        return not training(entries) and not unwritten

    def _has_work(self, entries: Sequence[Entry]) -> bool:
        owners = self.crew.owners()
        free = [entry for entry in training(entries) if entry.name not in owners]
        return bool(free or lost(self.crew, entries))

    def _stretch(self, folder: RunFolder) -> None:
        """Train candidates until none of them trains any more and there are no others to take."""
        attaching = self._field()
        member = Member(attaching, self.schedule, self.crew, folder, room=self.ground.room)
        try:
            if member.begin():
                report = self._train(folder, member)
                assert self.voice.writer is not None
                self.voice.writer.finish({"status": "finished", **report.outcome()})
                self.crew.forget(report.steps)
        except NonFiniteError as error:
            self.crew.forget(error.failed)
            if not self._all_failed(folder):
                raise
        finally:
            for adapter in attaching.handles.values():
                detach(self.ground.model, adapter)

    def _all_failed(self, folder: RunFolder) -> bool:
        """Whether nothing came of a stretch, which is written in the study."""
        with self.crew.locked():
            entries = self.schedule.advance()
        owners = self.crew.owners()
        own = [entry for entry in entries if owners.get(entry.name) == folder.path]
        return all(entry.stopped or entry.outcome == "failed" for entry in own)

    def _field(self) -> Field:
        ground, settings = self.ground, self.ground.settings.train
        course = Course(
            examples=ground.examples,
            held_out=ground.held_out,
            total=ground.total,
            rungs=ground.rungs,
            at_once=self.schedule.at_once,
            keeps_best=settings.keep_best,
        )
        how: dict[str, Any] = {"seed": settings.seed, "task": ground.task, "source": ground.source}
        how["tell"] = lambda kind, text: self.voice.say(text, kind)
        return Field(ground.model, self.study, course, ground.candidates.made, **how)

    def _train(self, folder: RunFolder, member: Member) -> TrainReport:
        ground = self.ground

        def recorder(step: int | None) -> Recorder:
            return self.voice.recorder(folder, ground.settings.to_yaml(), step)

        return train(
            ground.model,
            {},
            ground.settings.train,
            output_dir=folder,
            task=ground.task,
            recorder=recorder,
            manifest=_about(ground, self.crew.path),
            director=member,
            relay=member,
        )

    def answer(self, folder: RunFolder, began: float) -> dict[str, Any]:
        """Choose, and write what all have found, as one run."""
        ground, entries = self.ground, self.study.entries()
        names = [entry.name for entry in entries]
        joined = {entry.name: entry.joined or 0 for entry in entries}
        head, report = whole(self.crew, names, self.crew.size)
        self.crew.write_lines(names, joined)
        known = read_manifest(folder.manifest)
        head |= {key: known[key] for key in ("started", "processes")}
        recorder = self.voice.writing(folder, ground.settings.to_yaml())
        recorder.start(merged(head, _about(ground, folder.path)))
        search = Search(ground, folder, self.voice, began)
        handles = {
            entry.number: load_adapter(ground.model, report.folders[entry.name], name=entry.name)
            for entry in entries
            if entry.outcome == "finished" and entry.name in report.folders
        }
        with self.voice.work("choosing"):
            found = search.answer(self.study, handles, report)
        answer = search.write(self.study, report, found)
        with self.crew.locked():
            self.crew.disband()
        self.study.close()
        return answer


def _about(ground: Ground, path: Path) -> dict[str, Any]:
    about = manifest(prepared_of(ground), path)
    about["run"]["command"] = "search"
    return about
