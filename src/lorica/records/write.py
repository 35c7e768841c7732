"""What a run writes about itself while it trains.

A recorder takes the rows and events of a training loop. `RunRecorder` writes them into a run
folder, the displays of `live` show them, `Recorders` hands them to several. None of them may stop
the training: from the first step on, a full disk costs rows and one warning.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lorica.errors import ConfigError, LoricaWarning
from lorica.records.atomic import write_file
from lorica.records.folder import RunFolder, json_line, json_text, now
from lorica.records.read import Lines, Run, read_lines, read_manifest, read_run
from lorica.records.signals import signals_wait

__all__ = ["Recorder", "Recorders", "Run", "RunFolder", "RunRecorder", "read_run"]


class Recorder(Protocol):
    """What a training loop tells about itself, in this order: start, any steps and events,
    finish.
    """

    def start(self, manifest: dict) -> None:
        """Once, before the first step: the contents of run.json so far."""
        ...

    def step(self, row: dict) -> None:
        """A row of metrics.jsonl: step, epoch, adapter, loss, learning_rate, grad_norm, tokens,
        eval_loss ...
        """
        ...

    def event(self, kind: str, text: str) -> None:
        """Something to tell: kind is "info", "warning", "checkpoint", "best" or "evaluation"."""
        ...

    def finish(self, summary: dict) -> None:
        """Once, at the end, however it came: status, scores, resources; merged into run.json."""
        ...


class Recorders:
    """Hands everything to several recorders, in their order."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self.recorders = tuple(recorders)

    def start(self, manifest: dict) -> None:
        for recorder in self.recorders:
            recorder.start(manifest)

    def step(self, row: dict) -> None:
        for recorder in self.recorders:
            recorder.step(row)

    def event(self, kind: str, text: str) -> None:
        for recorder in self.recorders:
            recorder.event(kind, text)

    def finish(self, summary: dict) -> None:
        for recorder in self.recorders:
            recorder.finish(summary)


def write_end(folder: RunFolder, outcome: dict) -> None:
    """Say in run.json how a run ended that has no recorder: its status, and the error."""
    with signals_wait():  # cut here, the run would be said to go on
        earlier = read_manifest(folder.manifest)
        write_file(folder.manifest, json_text({**earlier, **outcome, "ended": now()}))


class RunRecorder:
    """Writes config.yaml, run.json, metrics.jsonl and events.jsonl of a run folder.

    Args:
        folder: the locked folder.
        config: text of config.yaml; None leaves the file as it is.
        resumed_step: the step of the checkpoint that the run goes on from; later rows of the
            earlier try are dropped.
        on_warning: takes the one sentence on a file that cannot be written; a Python warning by
            default.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        config: str | None = None,
        resumed_step: int | None = None,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = folder
        self._config = config
        self._resumed_step = resumed_step
        self._on_warning = on_warning or _warn
        self._manifest: dict = {}
        self._metrics = _Appender(folder.metrics, self._on_warning)
        self._events = _Appender(folder.events, self._on_warning)
        self._step: int | None = resumed_step
        self._began = time.monotonic()

    def start(self, manifest: dict) -> None:
        """Write config.yaml and run.json, and open the rows.

        Raises:
            ConfigError: the folder cannot be written; nothing has been trained yet, so this stops
                the run.
        """
        try:
            if self._config is not None:
                write_file(self.folder.config, self._config)
            if self._resumed_step is None:
                self._manifest = merged(_head(manifest), manifest)
            else:
                self._manifest = self._resumed_manifest(manifest, self._resumed_step)
                self._drop_later_rows(self._resumed_step)
            self._write_manifest()
            self._metrics.open()
            self._events.open()
        except OSError as error:
            raise ConfigError(
                f"cannot write the run folder {self.folder.path}: {error.strerror}",
                expected="a folder that this user may write in, on a disk with space",
                mend="free space, or choose another --output-dir",
            ) from error

    def step(self, row: dict) -> None:
        self._step = turn_of(row, self._step)
        self._metrics.append(row)

    def event(self, kind: str, text: str) -> None:
        seconds = round(time.monotonic() - self._began, 3)
        self._events.append({"step": self._step, "kind": kind, "text": text, "seconds": seconds})
        if kind == "checkpoint":  # rows up to a checkpoint survive whatever the checkpoint survives
            self._metrics.sync()

    def update(self, values: dict) -> None:
        """Merge `values` into run.json now, for what is known before the end."""
        self._manifest = merged(self._manifest, values)
        try:
            self._write_manifest()
        except OSError as error:
            self._on_warning(_lost(self.folder.manifest, error))

    def finish(self, summary: dict) -> None:
        with signals_wait():  # cut here, the run would be said to go on
            self.update(merged({"status": "finished", "ended": now()}, summary))
        self._metrics.close()
        self._events.close()

    def _resumed_manifest(self, manifest: dict, step: int) -> dict:
        """What the earlier try wrote, overlaid with `manifest`; its end, status and start are not
        those of this one.
        """
        earlier = read_manifest(self.folder.manifest)
        resumptions = [*earlier.pop("resumed", []), {"step": step, "at": now()}]
        earlier.pop("ended", None)
        kept = {"started": earlier.get("started", now())}
        return merged(earlier, manifest) | {"status": "running", "resumed": resumptions} | kept

    def _drop_later_rows(self, step: int) -> None:
        for path in (self.folder.metrics, self.folder.events):
            lines = read_lines(path)
            kept = [value for value in lines.values if (turn_of(value) or 0) <= step]
            if lines.torn or lines.broken or len(kept) != len(lines.values):
                write_file(path, b"".join(json_line(value) for value in kept))
            self._complain_of_lost_lines(path, lines)

    def _complain_of_lost_lines(self, path: Path, lines: Lines) -> None:
        if lines.broken:
            self._on_warning(
                f"{path.name}: {len(lines.broken)} unreadable lines were dropped (first: "
                f"{lines.broken[0]})"
            )

    def _write_manifest(self) -> None:
        write_file(self.folder.manifest, json_text(self._manifest))


class _Appender:
    """Appends lines to a file, whole lines or none, and warns once where that fails."""

    def __init__(self, path: Path, on_warning: Callable[[str], None]) -> None:
        self._path = path
        self._on_warning = on_warning
        self._descriptor: int | None = None
        self._size = 0
        self._warned = False
        self._waiting: list[dict] = []  # told before the run began: loading, reading data

    def open(self) -> None:
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._descriptor).st_size
        for value in self._waiting:
            self.append(value)
        self._waiting = []

    def append(self, value: dict) -> None:
        """Each line goes to the system at once: a killed process has lost none. Later lines are
        tried after a failure too, because space may come back."""
        if self._descriptor is None:
            self._waiting.append(value)
            return
        line = json_line(value)
        try:
            rest = line
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            self._size += len(line)
        except OSError as error:
            with contextlib.suppress(OSError):  # a device has no length
                os.ftruncate(self._descriptor, self._size)
            if not self._warned:
                self._warned = True
                self._on_warning(_lost(self._path, error))

    def sync(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            self.sync()
            os.close(self._descriptor)
            self._descriptor = None


def turn_of(row: Mapping, otherwise: int | None = None) -> int | None:
    """How far the run was at a row: its step, but of an adapter that joined later its turn."""
    return row.get("turn", row.get("step", otherwise))


def _head(manifest: Mapping) -> dict:
    """The first keys of run.json; "lorica" is what marks a run folder."""
    version = manifest.get("versions", {}).get("lorica", "unknown")
    return {"lorica": version, "status": "running", "started": now()}


def merged(old: Mapping, new: Mapping) -> dict:
    """`old` overlaid with `new`, mapping by mapping."""
    result = dict(old)
    for key, value in new.items():
        inner = result.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            result[key] = merged(inner, value)
        else:
            result[key] = value
    return result


def _lost(path: Path, error: OSError) -> str:
    return (
        f"{path} cannot be written ({error.strerror}): training goes on, but what belongs there "
        f"is lost. Free space on that disk."
    )


def _warn(text: str) -> None:
    warnings.warn(text, LoricaWarning, stacklevel=3)
