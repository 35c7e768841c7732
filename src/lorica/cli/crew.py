"""A run that several processes share, as one of them sees it: folder, waiting, the whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lorica.cli.ranks import Ranks, token_of, wait_for_first
from lorica.cli.voice import Voice
from lorica.config import Resolved
from lorica.errors import ConfigError, Interrupted, LoricaError, RunLocked
from lorica.records.atomic import write_file
from lorica.records.crew import Crew, is_crewed
from lorica.records.folder import RunFolder, json_text, now
from lorica.records.read import read_manifest
from lorica.records.write import merged
from lorica.train.loop import TrainReport

PAUSE = 0.2
"""Seconds between two looks for work."""

_SUMMARY = dict.fromkeys(("loss", "eval_loss", "stopped", "failed")) | {"steps": 0, "best_step": 0}
"""What training comes to, and what that is where a whole stretch came to nothing."""


def output_of(settings: Any, resume: Path | None) -> Path:
    """The folder of the run. Raises ConfigError where each process would make one of its own."""
    path = resume or settings.run.output_dir
    if path is None:
        raise ConfigError(
            "several processes need one output_dir", mend="name it: --output-dir runs/NAME"
        )
    return Path(path)


def enter(
    path: Path,
    found: Ranks,
    voice: Voice,
    start: Callable[[RunFolder], None],
    *,
    resume: bool,
    discard: bool,
) -> RunFolder | None:
    """The folder of the run where it is this process that holds it; None where another one does.

    The first process makes it, or goes on with it, and says so in run.json; the others wait for
    that. Whoever goes on with it while it is held joins those who work there.

    Args:
        start: writes what makes the folder a run.
    """
    if not found.first:
        wait_for_first(path, found, voice)
        return None
    if not resume:
        folder = RunFolder.create(path, replace=discard)
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


def _refuse_alone(path: Path) -> None:
    """Raises ConfigError for a run that one process began: its checkpoints are not shared out."""
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
def told(path: Path, crew: Crew, folder: RunFolder | None, command: str) -> Iterator[None]:
    """What is stopped or fails in here leaves a run that can be gone on with, and says so of the
    run and not of one of its stretches.

    Args:
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
                outcome = {"status": status, "ended": now()}
                mark(folder, outcome if status == "interrupted" else {**outcome, "error": text})
        if isinstance(error, LoricaError):
            error.what = _mended(error.what)
        if isinstance(error, LoricaError) and error.mend:
            parts = error.mend.split(str(crew.path / "workers"))
            text = str(path).join([parts[0], *(p.lstrip("/0123456789") for p in parts[1:])])
            error.mend = text.replace("lorica train --resume", f"lorica {command} --resume")
        raise


def _mended(what: str) -> str:
    """No checkpoint holds a state: see `keep_state` of `train`."""
    for untrue in ("the state was saved", "at once; the last checkpoint stands"):
        what = what.replace(untrue, "adapters that are not written yet begin anew")
    return what


def last_one(path: Path, folder: RunFolder | None) -> RunFolder | None:
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


def tell_where(path: Path, found: Ranks, voice: Voice) -> None:
    """Say where the result will lie, to whoever has joined others who write it."""
    if found.size == 1:
        voice.say(f"the work is done; another process writes the result: {path}")


def tell_of_checkpoints(settings: Resolved, found: Ranks, voice: Voice) -> None:
    """Say, once, that settings of checkpoints do nothing here."""
    if found.first and settings.train.save_steps is not None:
        voice.say(
            "save_steps has no effect: several processes write no checkpoints; an adapter that is "
            "not written when all are stopped begins anew",
            "warning",
        )


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
    first = next(iter(manifests.values()), {})
    own = {name: manifests.get(owners[name].name, {}) for name in names if name in owners}
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
