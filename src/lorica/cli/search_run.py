"""A search from end to end: what `lorica search` does.

The folder is a run of several adapters, with the study beside it:

    study.db      every candidate and what it reached     adapters/cNNN/   those that were trained
    search.json   the answer    report.html   its page     adapter/         the chosen one
    run.yaml      settings that train the chosen one again, to the same bits on the same machine

Wherever it is stopped, `lorica search --resume` goes on: see `search.field`.
"""

from __future__ import annotations

import gc
import json as jsonlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorica import __version__
from lorica.attach.activate import activate
from lorica.attach.attach import detach
from lorica.attach.handle import Adapter
from lorica.cli.anchoring import anchored
from lorica.cli.candidates import Candidates
from lorica.cli.manifest import manifest
from lorica.cli.prepared import Prepared
from lorica.cli.search_prepare import Ground, prepare_search
from lorica.cli.search_winner import write_winner
from lorica.cli.voice import Voice
from lorica.config import Resolved
from lorica.errors import ConfigError, LoricaError
from lorica.records.atomic import write_file
from lorica.records.folder import SEARCH, STUDY, RunFolder, json_text, now
from lorica.records.lines import aligned
from lorica.records.phrases import loss_text, parameters
from lorica.records.read import read_manifest
from lorica.records.search_page import write_search_page
from lorica.records.write import Recorder
from lorica.search.entry import Entry
from lorica.search.field import Course, Field, by_record
from lorica.search.result import CutTo, OfSpectrum, answer_of, as_dict
from lorica.search.space import name_of
from lorica.search.spectra import cut, has_spectra, smaller_ranks, spectra, suggested
from lorica.search.study import Study, import_optuna
from lorica.train.loop import train
from lorica.train.measure import mean_loss
from lorica.train.report import TrainReport


def execute_search(
    settings: Resolved,
    *,
    resume: Path | None = None,
    discard: bool = False,
    json: bool = False,
    quiet: bool = False,
    ignore_memory: bool = False,
) -> Path:
    """Run everything that `lorica search` does; returns the folder.

    Args:
        settings: of the run, with its section `search`.
        resume: the folder to go on with.
        discard: throw away an earlier run in the output folder.
        json, quiet: how the display speaks.
        ignore_memory: begin although the memory of the machine will not do.
    """
    began = time.monotonic()
    gc.freeze()
    voice = Voice(json=json, quiet=quiet)
    candidates = Candidates(settings)
    import_optuna()  # its absence is told before anything is read
    path = resume or Path(settings.run.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    if resume is not None and finished(path, voice):
        return path
    if resume is None:
        RunFolder.check(path, replace=discard)
    if settings.run.threads:
        torch.set_num_threads(settings.run.threads)
    try:
        ground = prepare_search(candidates, voice, ignore_memory=ignore_memory)
        held = RunFolder.open(path) if resume else RunFolder.create(path, replace=discard)
        with held as folder:
            search = Search(ground, folder, voice, began)
            found = search.go(resume=resume is not None)
    except LoricaError as error:
        if error.mend:
            error.mend = error.mend.replace("lorica train --resume", "lorica search --resume")
        raise
    if json:
        print(jsonlib.dumps({"type": "answer", "folder": str(path), **found}, ensure_ascii=False))
    else:
        print("\n".join(closing_lines(path, found, quiet=quiet)))
    return path


@dataclass
class Search:
    """A search whose folder is held."""

    ground: Ground
    folder: RunFolder
    voice: Voice
    began: float
    recorder: Recorder | None = field(default=None, init=False)

    def go(self, *, resume: bool) -> dict[str, Any]:
        """Train the candidates, choose, write the answer."""
        ground, settings = self.ground, self.ground.settings
        if not resume:
            begin(self.folder, settings)
        study = self._study()
        try:
            ground.voice_plan(self.voice)
            director = self._field(study)
            report = self._train(director, resume)
            with self.voice.work("choosing"):
                found = self.answer(study, director.handles, report)
            return self.write(study, report, found)
        finally:
            study.close()

    def _study(self) -> Study:
        ground = self.ground
        storage = ground.space.how.storage or str(self.folder.path / STUDY)
        return Study(
            storage,
            ground.space,
            seed=ground.settings.train.seed,
            identity=ground.identity(),
            run=str(self.folder.path.absolute()),
        )

    def _field(self, study: Study) -> Field:
        ground = self.ground
        train = ground.settings.train
        course = Course(
            examples=ground.examples,
            held_out=ground.held_out,
            total=ground.total,
            rungs=ground.rungs,
            at_once=ground.at_once,
            keeps_best=train.keep_best,
        )
        made = ground.candidates.made
        how: dict[str, Any] = {"seed": train.seed, "task": ground.task, "source": ground.source}
        how["tell"] = lambda kind, text: self.voice.say(text, kind)
        return Field(ground.model, study, course, made, **how)

    def _train(self, director: Field, resume: bool) -> TrainReport:
        ground = self.ground

        def recorder(step: int | None) -> Recorder:
            self.recorder = self.voice.recorder(self.folder, ground.settings.to_yaml(), step)
            return self.recorder

        about = manifest(prepared_of(ground), self.folder.path)
        about["run"]["command"] = "search"
        return train(
            ground.model,
            {},
            ground.settings.train,
            output_dir=self.folder,
            task=ground.task,
            recorder=recorder,
            manifest=about,
            director=director,
            resume=resume,
        )

    def answer(
        self, study: Study, handles: Mapping[int, Adapter], report: TrainReport
    ) -> dict[str, Any]:
        """What was found, as search.json has it.

        Args:
            handles: the adapters of the candidates, on the base.
        """
        how = self.ground.space.how
        entries, tokens = study.entries(), study.tokens
        answer = answer_of(entries, tokens, how.standard_errors)
        spectrum = self._spectrum(entries, handles) if how.spectrum else None
        steps = sum(entry.last_step for entry in entries)
        whole = self.ground.total * sum(bool(entry.curve) for entry in entries)
        return {
            **as_dict(entries, tokens, answer, spectrum),
            "about": {
                "model": self.ground.settings.run.model,
                "data": self.ground.settings.run.data,
                "sampler": self.ground.space.sampler,
                "rungs": list(self.ground.rungs),
                "total_steps": self.ground.total,
            },
            "resources": {
                **report.resources,
                "total_seconds": time.monotonic() - self.began,
                "at_once": self.ground.at_once,
                "steps": steps,
                "share_of_steps": steps / max(1, whole),
            },
        }

    def _spectrum(
        self, entries: Sequence[Entry], handles: Mapping[int, Adapter]
    ) -> OfSpectrum | None:
        """Of the largest rank that trained to its end here; the better one of several."""
        own = [
            entry
            for entry in entries
            if entry.outcome == "finished"
            and entry.number in handles
            and has_spectra(handles[entry.number])
        ]
        if not own:
            return None
        entry = max(own, key=lambda e: (e.rank or 0, -(e.loss or 0.0)))
        adapter = handles[entry.number]
        layers = spectra(adapter)
        ranks = smaller_ranks(entry.rank or 0, [e.rank for e in entries if e.rank])
        cuts = [self._cut(adapter, rank) for rank in ranks]
        r, pattern = suggested(layers)
        by_layer = {one.path: pattern.get(one.path, r) for one in layers}
        return OfSpectrum(entry.number, layers, [*cuts, self._cut(adapter, by_layer)])

    def _cut(self, adapter: Adapter, rank: int | dict[str, int]) -> CutTo:
        """The adapter cut to a smaller rank, scored on the evaluation records."""
        ground = self.ground
        less = cut(ground.model, adapter, rank, name="cut")
        try:
            losses: list[float] = []
            train, held_out = ground.settings.train, ground.held_out
            size = train.eval_batch_size or train.batch_size
            with activate(ground.model, less):
                mean_loss(ground.model, ground.task, held_out, size, each=losses)
            tokens, rows = [e.num_trained for e in held_out], [e.row for e in held_out]
            summed, _ = by_record(losses, tokens, rows)
            most = rank if isinstance(rank, int) else max(rank.values())
            return CutTo(most, less.num_parameters, summed, is_pattern=not isinstance(rank, int))
        finally:
            detach(ground.model, less)

    def write(self, study: Study, report: TrainReport, found: dict[str, Any]) -> dict[str, Any]:
        """The chosen adapter, its settings, the answer and its page; run.json last."""
        entry = study.entry(found["chosen"])
        chosen = self.ground.candidates.resolved(entry.point)
        about = {**read_manifest(self.folder.manifest), **report.outcome()}
        write_winner(self.folder, entry, chosen, prepared_of(self.ground), about)
        write_file(self.folder.path / SEARCH, json_text(found))
        assert self.voice.writer is not None
        chosen_words = {"candidate": entry.name, "settings": entry.point}
        summary = {
            "status": "finished",
            **report.outcome(),
            "search": {**chosen_words, "sentence": found["sentence"]},
        }
        self.voice.writer.finish(summary)
        write_search_page(self.folder.path)
        self.voice.display.finish({key: summary[key] for key in ("status", "resources")})
        return found


def prepared_of(ground: Ground) -> Prepared:
    """The search as a run of one adapter, for what tells about runs."""
    nobody: Any = None
    parts = ground.settings, ground.material, ground.model, nobody, ground.task
    return Prepared(*parts, ground.examples, list(ground.held_out), [], ground.memory)


def begin(folder: RunFolder, settings: Resolved) -> None:
    write_file(folder.config, anchored(settings).to_yaml())
    head = {"lorica": __version__, "status": "running", "started": now()}
    run = {"path": str(folder.path), "command": "search"}
    write_file(folder.manifest, json_text({**head, "run": run}))


def finished(path: Path, voice: Voice) -> bool:
    """Says so where a search has its answer already, and writes its page where that is missing.

    Raises:
        ConfigError: there is no search in `path`.
    """
    found = read_manifest(path / "run.json")
    if found.get("run", {}).get("command") != "search":
        raise ConfigError(
            f"{path} holds a run, but no search",
            mend=f"go on with it: lorica train --resume {path}",
        )
    if found.get("status") != "finished":
        return False
    if not (path / "report.html").is_file():
        write_search_page(path)
    voice.say(f"the search in {path} is finished: {found['search']['sentence']}")
    return True


def closing_lines(path: Path, found: dict[str, Any], *, quiet: bool) -> list[str]:
    """The answer: candidates in a table, the reason in a sentence, where things lie."""
    lines = [] if quiet else ["", *aligned(table(found), left=("candidate", "", "settings"))]
    return [
        *lines,
        "",
        f"chosen   {found['sentence']}",
        f"adapter  {path / 'adapter'}",
        f"settings {path / 'run.yaml'}",
        f"report   {path / 'report.html'}",
    ]


def table(found: dict[str, Any]) -> list[list[str]]:
    """The candidates, best first, for a terminal."""
    rows = [["candidate", "settings", "parameters", "loss", "above best", "error", "steps", ""]]
    order = {"finished": 0, "cut": 1}
    for c in sorted(
        found["candidates"], key=lambda c: (order.get(c["outcome"], 2), c["loss"] or 0.0)
    ):
        finished = c["difference"] is not None
        mark = "chosen" if c["number"] == found["chosen"] else ""
        rows.append(
            [
                c["name"],
                name_of(c["settings"]),
                parameters(c["parameters"]),
                loss_text(c["loss"]),
                f"{c['difference']:+.4f}" if finished else "–",
                f"{c['error']:.4f}" if finished else "–",
                str(c["steps"]),
                mark or ("" if finished else c["outcome"]),
            ]
        )
    return rows
