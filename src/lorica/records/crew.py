"""Several processes that train adapters of one run: who has which, and whose work is free again.

output_dir/workers/1/ ...     a run folder for every stretch of work of one process, with its lock
output_dir/workers/identity.json   what the run was begun with, where no study says it
output_dir/workers.json       adapter -> the folder of the process that trains it
output_dir/workers.lock       held while somebody reads or changes what all share

There are no messages between the processes, so none waits for one that is gone. The system gives
the lock of a folder back when the process that holds it dies, however it dies; what it had not
written by then is free, and another process begins it anew, to the same bits.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorica.errors import ConfigError
from lorica.records.atomic import write_file
from lorica.records.folder import (
    ADAPTERS,
    EVENTS,
    MANIFEST,
    METRICS,
    WORKERS,
    WORKERS_LOCK,
    WORKERS_OWNERS,
    RunFolder,
    json_line,
    json_text,
    lock_is_held,
)
from lorica.records.read import read_lines, read_manifest

_MARK = "adapter_config.json"
_IDENTITY = "identity.json"


class Crew:
    """What the processes of one run share, apart from a study.

    Args:
        path: the run folder.
        size: how many processes were started.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path.absolute(), size

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep the others out for a moment. What is done in here must be short."""
        descriptor = os.open(self.path / WORKERS_LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def begin(self) -> RunFolder:
        """A new folder for a stretch of work, held by this process. Call it with the lock."""
        folder = self.path / WORKERS
        folder.mkdir(exist_ok=True)
        number = max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) + 1
        return RunFolder.create(folder / str(number))

    def owners(self) -> dict[str, Path]:
        """Adapter -> the folder of the process that has taken it."""
        file = self.path / WORKERS_OWNERS
        found = json.loads(file.read_bytes()) if file.is_file() else {}
        return {name: Path(owner) for name, owner in found.items()}

    def take(self, names: Iterable[str], folder: RunFolder) -> None:
        """Write down that the process which holds `folder` has these now. Call it with the lock."""
        taken = dict.fromkeys(names, folder.path)
        owners = {name: str(owner) for name, owner in (self.owners() | taken).items()}
        write_file(self.path / WORKERS_OWNERS, json_text(owners))

    def adapter(self, name: str, owner: Path | None) -> Path | None:
        """Where a trained adapter lies; None where it was not written yet."""
        places = [self.path, *([owner] if owner else [])]
        found = (place / ADAPTERS / name for place in places)
        return next((folder for folder in found if (folder / _MARK).is_file()), None)

    def is_written(self, name: str, owner: Path | None) -> bool:
        """Whether an adapter lies there, and with it, in run.json of its owner, what its training
        came to: that is written last.
        """
        if owner is None or (self.path / ADAPTERS / name / _MARK).is_file():
            return self.adapter(name, None) is not None
        done = self.training(owner).get("steps", {})
        return name in done and self.adapter(name, owner) is not None

    def training(self, owner: Path | None) -> dict[str, Any]:
        """What the training in a folder came to; nothing where that is not known yet."""
        file = owner / MANIFEST if owner is not None else None
        return read_manifest(file).get("training", {}) if file and file.is_file() else {}

    def is_lost(self, name: str, owner: Path | None) -> bool:
        """Whether somebody had taken an adapter, and is gone without having written it."""
        return owner is not None and not lock_is_held(owner) and not self.is_written(name, owner)

    def share(self, number: int) -> int:
        """How many of so many adapters a process takes, where all processes live."""
        return -(-number // self.size)

    @property
    def is_over(self) -> bool:
        """Whether the run is finished, and there is nothing to share any more."""
        file = self.path / MANIFEST
        return file.is_file() and read_manifest(file).get("status") == "finished"

    def agree(self, identity: Mapping[str, str]) -> None:
        """Write down what the run is, or compare it with what is written. Call it with the lock.

        Raises:
            ConfigError: the run was begun with something else.
        """
        file = self.path / WORKERS / _IDENTITY
        if self.is_over:
            return
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            write_file(file, json_text(dict(identity)))
            return
        had = read_manifest(file)
        differing = sorted(k for k in {*had, *identity} if had.get(k) != identity.get(k))
        if differing:
            raise ConfigError(
                f"the run in {self.path} was begun with other settings or data",
                problems=[f"{k} is {identity.get(k)}, and was {had.get(k)}" for k in differing],
                mend="go on with those that it had, or choose another output_dir",
            )

    # the end

    def gather(self, names: Iterable[str]) -> dict[str, dict]:
        """Bring adapters, rows and events of all into the folder of the run. The same again
        changes nothing. Call it with the lock.

        Returns:
            number of the folder -> run.json of each that was the last to have one of the adapters.
        """
        owners = self.owners()
        found: dict[str, dict] = {}
        for name in names:
            owner = owners.get(name)
            if owner is not None and (owner / MANIFEST).is_file():
                found[owner.name] = read_manifest(owner / MANIFEST)
            lies = self.adapter(name, owner)
            target = self.path / ADAPTERS / name
            if lies is not None and lies != target:
                target.parent.mkdir(exist_ok=True)
                os.rename(lies, target)
        return found

    def write_lines(self, names: Iterable[str], joined: Mapping[str, int]) -> None:
        """metrics.jsonl and events.jsonl of the run, from those of the processes.

        Args:
            joined: of an adapter, the turns of the run before its first step.
        """
        owners, names = self.owners(), list(names)
        rows, events = [], []
        for folder in sorted({*owners.values()}, key=lambda path: int(path.name)):
            for row in read_lines(folder / METRICS).values:
                name = row.get("adapter", "")
                if owners.get(name) == folder:
                    row.pop("turn", None)
                    late = joined.get(name, 0)
                    turn = {"turn": row["step"] + late} if late else {}
                    rows.append({"step": row.pop("step"), **turn, **row})
            events += read_lines(folder / EVENTS).values
        rows.sort(key=lambda row: (row.get("turn", row["step"]), names.index(row["adapter"])))
        told: dict[str, dict] = {}
        for event in events:
            told.setdefault(event.get("text", ""), event)
        write_file(self.path / METRICS, b"".join(map(json_line, rows)))
        write_file(self.path / EVENTS, b"".join(map(json_line, told.values())))

    def disband(self) -> None:
        """Remove what only the work needed. Call it with the lock."""
        shutil.rmtree(self.path / WORKERS, ignore_errors=True)
        (self.path / WORKERS_OWNERS).unlink(missing_ok=True)


def is_crewed(path: Path) -> bool:
    """Whether several processes began the run in `path`, and it is not finished."""
    return (path / WORKERS).is_dir()
