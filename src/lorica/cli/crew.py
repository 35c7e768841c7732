"""A run that several processes share, as one of them sees it: folder, waiting, the whole."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from lorica.cli.ranks import Ranks, choose_device, token_of, wait_for_first
from lorica.cli.voice import Voice
from lorica.config import Resolved
from lorica.errors import ConfigError, Interrupted, LoricaError, RunLocked
from lorica.records.atomic import write_file
from lorica.records.crew import Crew, is_crewed
from lorica.records.folder import RunFolder, json_text
from lorica.records.read import read_manifest
from lorica.records.write import merged, write_end
from lorica.train.report import TrainReport

PAUSE = 0.2
"""Seconds between two looks for work."""

_SUMMARY = dict.fromkeys(("loss", "eval_loss", "stopped", "failed")) | {"steps": 0, "best_step": 0}
"""What training comes to, and what that is where a whole stretch came to nothing."""


Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Together:
    """A run of several processes, as one of them sees it.

    Attributes:
        path: the folder of the run, as the user wrote it.
        command: of lorica, which began it and goes on with it.
        found: which process this is.
        voice: what this process says.
        resume: go on with what is there, and do not begin.
        discard: throw away an earlier run in the folder.
    """

    path: Path
    command: str
    found: Ranks
    voice: Voice
    resume: bool
    discard: bool

    @classmethod
    def of(
        cls,
        settings: Resolved,
        found: Ranks,
        command: str,
        *,
        resume: Path | None,
        discard: bool,
        json: bool,
        quiet: bool,
    ) -> Together:
        """Raises ConfigError where each process would make a folder of its own."""
        choose_device()
        voice = Voice(json=json and found.first, quiet=quiet or not found.first)
        path = resume or settings.run.output_dir
        if path is None:
            raise ConfigError(
                "several processes need one output_dir", mend="name it: --output-dir runs/NAME"
            )
        return cls(Path(path), command, found, voice, resume is not None, discard)

    def prepare(self, settings: Resolved, how: Callable[[Voice], Work]) -> Work:
        """What all processes do before the run begins, of which only the first one tells.

        Raises:
            ConfigError: there is a run in the folder already, or something else.
        """
        if self.found.first and not self.resume:
            RunFolder.check(self.path, replace=self.discard)
        if settings.run.threads:
            torch.set_num_threads(settings.run.threads)
        return how(self.voice if self.found.first else Voice(quiet=True, stream=io.StringIO()))

    def see_through(
        self,
        start: Callable[[RunFolder], None],
        work: Callable[[Crew], Work],
        end: Callable[[Work, RunFolder], Result],
    ) -> Result | None:
        """Do this process's part of a run.

        Args:
            start: writes what makes the folder a run.
            work: trains with the others until there is nothing left to train.
            end: writes the end of the run.

        Returns:
            of `end`; None where another process writes the end.
        """
        folder = None
        try:
            folder = self._enter(start)
            crew = Crew(self.path, self.found.size)
            with _told(self.path, crew, folder, self.command), crew.present():
                done = work(crew)
            folder = _last_one(self.path, folder)
            if folder is None:
                self._tell_where()
                return None
            with _told(self.path, crew, folder, self.command):
                return end(done, folder)
        except LoricaError as error:
            error.shared = isinstance(error, ConfigError)  # other settings than at the beginning
            raise
        finally:
            if folder is not None:
                folder.close()

    def _enter(self, start: Callable[[RunFolder], None]) -> RunFolder | None:
        """The folder of the run where it is this process that holds it; None where another does.

        The first process makes it, or goes on with it, and says so in run.json; the others wait for
        that. Whoever goes on with it while it is held joins those who work there.
        """
        path, found = self.path, self.found
        if not found.first:
            wait_for_first(path, found, self.voice)
            return None
        if not self.resume:
            folder = RunFolder.create(path, replace=self.discard)
            start(folder)
        else:
            _refuse_alone(path)
            try:
                folder = RunFolder.open(path)
            except RunLocked:
                if found.size > 1:
                    raise
                return None
        sizes = {"token": found.token, "size": found.size}
        mark(folder, {"status": "running", "processes": sizes})
        return folder

    def _tell_where(self) -> None:
        """Say where the result will lie, to whoever has joined others who write it."""
        if self.found.size == 1:
            told = f"the work is done; another process writes the result: {self.path}"
            self.voice.say(told)


def _refuse_alone(path: Path) -> None:
    """Raises ConfigError for a run that one process began: it has checkpoints of all adapters."""
    if token_of(path) is None and not is_crewed(path):
        raise ConfigError(
            f"one process began the run in {path}, and several cannot go on with it",
            mend="go on with it without torchrun, or begin another one with it",
        )


def mark(folder: RunFolder, values: Mapping[str, Any]) -> None:
    """Merge something into run.json."""
    known = read_manifest(folder.manifest)
    write_file(folder.manifest, json_text(merged(known, values)))


@contextmanager
def _told(path: Path, crew: Crew, folder: RunFolder | None, command: str) -> Iterator[None]:
    """What is stopped or fails in here leaves a run that can be gone on with, and says so of the
    run and not of one of its stretches.

    Args:
        path: of the run, as the user wrote it.
        command: of lorica, which goes on with the run.
    """
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        known = read_manifest(folder.manifest) if folder is not None else {}
        if folder is not None and known.get("status") != "finished":
            with suppress(OSError):
                text = f"{type(error).__name__}: {error}"
                told = {} if status == "interrupted" else {"error": text}
                write_end(folder, {"status": status, **told})
        if isinstance(error, LoricaError) and error.mend:
            parts = error.mend.split(str(crew.path / "workers"))
            text = str(path).join([parts[0], *(p.lstrip("/0123456789") for p in parts[1:])])
            error.mend = text.replace("lorica train --resume", f"lorica {command} --resume")
        raise


def _last_one(path: Path, folder: RunFolder | None) -> RunFolder | None:
    """Who writes the end: the process that holds the folder; where that is gone, the first to take
    its lock. None where another one does.
    """
    if folder is not None:
        return folder
    with suppress(RunLocked):
        folder = RunFolder.open(path)
        if read_manifest(folder.manifest).get("status") != "finished":
            return folder
        folder.close()
    return None


def wait() -> None:
    """A moment, in which others may come further."""
    time.sleep(PAUSE)


def whole(crew: Crew, names: Sequence[str], size: int) -> tuple[dict[str, Any], TrainReport]:
    """(run.json, what training came to) of a run, from those of its stretches of work, which it
    gathers.
    """
    with crew.locked():
        manifests = crew.gather(names)
        owners = crew.owners()
    own = {name: manifests.get(owners[name].name, {}) for name in names if name in owners}
    first = next(iter(own.values()), {})
    adapters = {
        name: {**entry, "path": str(crew.adapter(name, None) or crew.path / "adapters" / name)}
        for name, found in own.items()
        if (entry := found.get("adapters", {}).get(name))
    }
    training: dict[str, Any] = {
        key: {n: found.get("training", {}).get(key, {}).get(n, nothing) for n, found in own.items()}
        for key, nothing in _SUMMARY.items()
    }
    resources = _resources([found.get("resources", {}) for found in manifests.values()], size)
    folders = {name: path for name in adapters if (path := crew.adapter(name, None))}
    report = TrainReport(
        **training,
        folders=folders,
        seconds=resources["seconds"],
        tokens_per_second=resources["tokens_per_second"],
        peak_memory_bytes=resources["peak_memory_bytes"],
        resources=resources,
        adapters=adapters,
    )
    kept = ("versions", "base", "task", "seed", "plan", "labels", "num_labels")
    head = {key: first[key] for key in kept if key in first}
    if "plan" in head:
        plans = [found["plan"] for found in manifests.values() if "plan" in found]
        most = {key: max(plan[key] for plan in plans) for key in ("max_steps", "epochs")}
        head["plan"] = {**head["plan"], **most}
    return {**head, "adapters": adapters}, report


def _resources(found: Sequence[Mapping[str, Any]], size: int) -> dict[str, Any]:
    """Of all stretches together; seconds are those of the steps of all processes, summed."""
    found = [one for one in found if "seconds" in one]
    seconds = sum(one["seconds"] for one in found)
    tokens = sum(one["seconds"] * one["tokens_per_second"] for one in found)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "peak_memory_bytes": max((one["peak_memory_bytes"] for one in found), default=0),
        "num_threads": found[0]["num_threads"] if found else 1,
        "device": found[0]["device"] if found else "cpu",
        "adapter_bytes": sum(one["adapter_bytes"] for one in found),
        "processes": size,
    }
