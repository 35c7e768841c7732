"""Several processes that train adapters of one run: who has which, and whose work is free again.

output_dir/workers/1/ ...     a run folder for every stretch of work of one process, with its lock
output_dir/workers/states/NAME/    the state of an adapter that somebody trains: see `train.relay`
output_dir/workers/present-...     held by each process that works on the run
output_dir/workers/identity.json   what the run was begun with, where no study says it
output_dir/workers.json       adapter -> the folder of the process that trains it
output_dir/workers.lock       held while somebody reads or changes what all share

There are no messages between the processes, so none waits for one that is gone. The system gives
the lock of a folder back when the process that holds it dies, however it dies; what it had not
written by then is free, and another process goes on with it from its newest state, to the same
bits. A process that has more to do than another gives it away in the same manner.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lorica.errors import ConfigError
from lorica.records.atomic import sync_folder, write_file
from lorica.records.folder import (
    ADAPTERS,
    EVENTS,
    MANIFEST,
    METRICS,
    WORKERS,
    WORKERS_LOCK,
    WORKERS_OWNERS,
    RunFolder,
    is_held,
    json_line,
    json_text,
    lock_is_held,
)
from lorica.records.read import read_lines, read_manifest

LOOK_EVERY = 1.0
"""Seconds between two looks at what others do, of a process that has work."""

_MARK = "adapter_config.json"
_IDENTITY = "identity.json"
_STATES, _PRESENT = "states", "present-"


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

    @contextmanager
    def present(self) -> Iterator[None]:
        """Be counted, while in here, among the processes that train."""
        file = self.path / WORKERS / f"{_PRESENT}{os.getpid()}-{secrets.token_hex(4)}"
        with ExitStack() as held:
            with self.locked():
                if not self.is_over:  # else the folder is gone, and nobody counts
                    file.parent.mkdir(exist_ok=True)
                    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
                    held.callback(os.close, descriptor)
                    held.callback(file.unlink, missing_ok=True)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield

    @property
    def states(self) -> Path:
        """Where the states of adapters lie that are not written yet."""
        return self.path / WORKERS / _STATES

    def forget(self, names: Iterable[str]) -> None:
        """Remove the states of adapters that are written or have failed."""
        for name in names:
            shutil.rmtree(self.states / name, ignore_errors=True)

    def begin(self) -> RunFolder:
        """A new folder for a stretch of work, held by this process. Call it with the lock."""
        folder = self.path / WORKERS
        folder.mkdir(exist_ok=True)
        number = max((int(path.name) for path in self._folders()), default=0) + 1
        return RunFolder.create(folder / str(number))

    def _folders(self) -> list[Path]:
        """Those of all stretches of work, in the order in which they were begun."""
        folder = self.path / WORKERS
        found = (p for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else ()
        return sorted(found, key=lambda path: int(path.name))

    def owners(self) -> dict[str, Path]:
        """Adapter -> the folder of the process that has taken it."""
        file = self.path / WORKERS_OWNERS
        found = json.loads(file.read_bytes()) if file.is_file() else {}
        return {name: Path(owner) for name, owner in found.items()}

    def take(self, names: Iterable[str], folder: RunFolder) -> None:
        """Write down that the process which holds `folder` has these now. Call it with the lock."""
        self._write(self.owners() | dict.fromkeys(names, folder.path))

    def release(self, name: str) -> None:
        """Write down that nobody has an adapter any more. Call it with the lock."""
        self._write({other: owner for other, owner in self.owners().items() if other != name})

    def _write(self, owners: Mapping[str, Path]) -> None:
        write_file(
            self.path / WORKERS_OWNERS, json_text({name: str(p) for name, p in owners.items()})
        )

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

    def balance(self, folder: RunFolder, active: Iterable[str]) -> int:
        """How many adapters more the holder of a folder should train so that all processes train
        about as many; below 0, how many fewer. Call it with the lock.

        Free adapters go to those with the fewest. Whoever has two more than another gives one away.

        Args:
            active: adapters that are to be trained further, by whomever.
        """
        owners = self.owners()
        number = {path: 0 for path in self._folders() if lock_is_held(path)}
        free = 0
        for name in active:
            owner = owners.get(name)
            if owner in number:
                number[owner] += 1
            else:
                free += 1
        own = before = number.pop(folder.path)
        idle = max(0, self._num_present() - len(number) - 1)
        others = sorted([*number.values(), *[0] * idle])
        for _ in range(free):
            if not others or own <= others[0]:
                own += 1
            else:
                others = sorted([others[0] + 1, *others[1:]])
        while others and own >= others[0] + 2:
            own, others = own - 1, sorted([others[0] + 1, *others[1:]])
        return own - before

    def _num_present(self) -> int:
        return sum(map(is_held, (self.path / WORKERS).glob(f"{_PRESENT}*")))

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
            number of the folder -> run.json of every stretch of work.
        """
        owners = self.owners()
        for name in names:
            lies = self.adapter(name, owners.get(name))
            target = self.path / ADAPTERS / name
            if lies is not None and lies != target:
                target.parent.mkdir(exist_ok=True)
                os.rename(lies, target)
                sync_folder(target.parent)
        written = (path for path in self._folders() if (path / MANIFEST).is_file())
        return {path.name: read_manifest(path / MANIFEST) for path in written}

    def write_lines(self, names: Iterable[str], joined: Mapping[str, int]) -> None:
        """metrics.jsonl and events.jsonl of the run, from those of the processes. A row that two
        have written, one of which was lost, is the same but for what it tells of time and memory.

        Args:
            joined: of an adapter, the turns of the run before its first step.
        """
        order = {name: place for place, name in enumerate(names)}
        found: dict[tuple[str, int], dict] = {}
        events = []
        for folder in self._folders():
            for row in read_lines(folder / METRICS).values:
                name = row.get("adapter", "")
                if name in order:
                    row.pop("turn", None)
                    late, step = joined.get(name, 0), row.pop("step")
                    turn = {"turn": step + late} if late else {}
                    found[name, step] = {"step": step, **turn, **row}
            events += read_lines(folder / EVENTS).values
        rows = [*found.values()]
        rows.sort(key=lambda row: (row.get("turn", row["step"]), order[row["adapter"]]))
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
