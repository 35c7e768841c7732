"""The run folder on disk: its layout, and the lock that keeps a second process out.

config.yaml     resolved settings, each with a comment saying where the value came from
run.json        versions, digests, seed, status, scores of base and tuned, resources
metrics.jsonl   a row per logged step          events.jsonl   warnings, checkpoints, best marks
samples.jsonl   input, before, after, references; samples/ holds the pictures of a run that draws
relevance.json  how much each layer matters, where records decided about the adapter; and
                relevance.safetensors, the scores of single neurons or heads
adapter/        the adapter (adapters/NAME/ where a run trains several)
checkpoints/    report.html     .lock
stages/1/ ...   the run folder of every stage, where a run has several
study.db        of a search: every candidate with what it reached; search.json, the answer; and
                run.yaml, which trains the chosen one again (adapter/)
workers/1/ ...  the run folders of several processes that share the adapters, until they are
                gathered; workers.json, who has which; workers.lock
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from lorica.errors import ConfigError, LoricaError, RunLocked
from lorica.records.atomic import sync_folder, write_file

CONFIG, MANIFEST, METRICS = "config.yaml", "run.json", "metrics.jsonl"
EVENTS, SAMPLES, REPORT, LOCK = "events.jsonl", "samples.jsonl", "report.html", ".lock"
ADAPTER, ADAPTERS, CHECKPOINTS = "adapter", "adapters", "checkpoints"
STAGES = "stages"
PICTURES = "samples"
STUDY, SEARCH, RUN_YAML = "study.db", "search.json", "run.yaml"
WORKERS, WORKERS_OWNERS, WORKERS_LOCK = "workers", "workers.json", "workers.lock"
RELEVANCE, RELEVANCE_SCORES = "relevance.json", "relevance.safetensors"
LAYOUT = (
    *(MANIFEST, CONFIG, METRICS, EVENTS, SAMPLES, RELEVANCE, RELEVANCE_SCORES, REPORT),
    *(ADAPTER, ADAPTERS, CHECKPOINTS, STAGES, PICTURES),
    *(STUDY, f"{STUDY}-journal", SEARCH, RUN_YAML),
    *(WORKERS, WORKERS_OWNERS, WORKERS_LOCK),
)

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SPREAD = re.compile(r"^shard_base: true\b", re.MULTILINE)
"""A setting by which several processes make the run."""
_TEMPORARY = (".tmp-", ".old-")
"""Beginnings of the names of what a stopped process left half-done."""
_LOCK_ATTEMPTS, _LOCK_PAUSE = (
    5,
    0.04,
)  # a reader that asks whether a run is alive holds the lock for microseconds


class RunFolder:
    """A run folder held under its lock; a context manager. The lock dies with the process, also by
    `kill -9`.

    Build it with `create` (a new run) or `open` (an old one, to go on with it). Reading needs no
    lock: see `read_run`.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    @classmethod
    def create(cls, path: str | Path, *, replace: bool = False) -> Self:
        """Make the folder of a new run and lock it.

        Args:
            path: the folder; made with its parents where absent, and empty or left by a run that
                never started.
            replace: remove an earlier run in `path` first. Only files of the layout above are
                removed.

        Raises:
            ConfigError: the folder holds something else, or a run while `replace` is False, or
                cannot be written.
            RunLocked: another process works in it.
        """
        path = Path(path)
        cls.check(path, replace=replace)
        try:
            _make(path)
        except OSError as error:
            raise _unwritable(path, error) from error
        folder = cls(path, _lock(path))
        try:
            _refuse_run(path, replace)  # again: another process may have been faster
            folder._clear()
        except BaseException:
            folder.close()
            raise
        return folder

    @staticmethod
    def check(path: str | Path, *, replace: bool = False) -> None:
        """Whether `create` would take `path`; writes nothing.

        Raises:
            ConfigError: the folder holds something else, or a run while `replace` is False, or
                cannot be written.
            RunLocked: another process works in it.
        """
        path = Path(path)
        try:
            if path.is_dir():
                refuse_held(path)
                _refuse_foreign(path)
                _refuse_run(path, replace)
            _refuse_unwritable(path)
        except OSError as error:
            raise _unwritable(path, error) from error

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Lock the folder of an existing run, to go on with it.

        Raises:
            ConfigError: there is no run in `path`, or it cannot be written.
            RunLocked: another process works in it.
        """
        path = Path(path)
        if not _is_run(path):
            raise ConfigError(
                f"{path} holds no run to go on with",
                expected=f"a folder with a {MANIFEST} written by lorica",
                mend="check --output-dir, or start without --resume",
            )
        folder = cls(path, _lock(path))
        folder._remove_temporary()
        return folder

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def events(self) -> Path:
        return self.path / EVENTS

    @property
    def samples(self) -> Path:
        return self.path / SAMPLES

    @property
    def report(self) -> Path:
        return self.path / REPORT

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def adapter(self, name: str | None = None) -> Path:
        """Where an adapter belongs: `adapter/` for the only one (name None), `adapters/NAME/` for
        one of several.
        """
        if name is None:
            return self.path / ADAPTER
        if not _ADAPTER_NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot name a folder",
                expected="letters, digits, dot, dash and underscore, at most 64, a letter or "
                "digit first",
                mend="rename the adapter",
            )
        return self.path / ADAPTERS / name

    def write_samples(self, samples: Iterable[dict]) -> Path:
        """Write samples.jsonl: {"input", "before", "after", "references"} and, with several
        adapters, "adapter".
        """
        return write_file(self.samples, b"".join(json_line(sample) for sample in samples))

    def write_relevance(self, relevance: dict) -> Path:
        """Write relevance.json; see `records.relevance`."""
        return write_file(self.path / RELEVANCE, json_text(relevance))

    def close(self) -> None:
        """Give the lock back. The file stays: removing it would let two processes lock two files of
        one name.
        """
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _clear(self) -> None:
        # the manifest goes first: a crash half-way leaves a folder that counts as never started
        for name in LAYOUT:
            _remove(self.path / name)
        self._remove_temporary()

    def _remove_temporary(self) -> None:
        for entry in self.path.iterdir():
            if entry.name.startswith(_TEMPORARY):
                _remove(entry)


def refuse_held(path: str | Path) -> None:
    """Raises RunLocked where another process works in the run folder; takes no lock itself."""
    if lock_is_held(path):
        descriptor = os.open(Path(path) / LOCK, os.O_RDONLY)
        try:
            raise _locked(Path(path), descriptor)
        finally:
            os.close(descriptor)


def lock_is_held(path: str | Path) -> bool:
    """Whether a living process works in the run folder `path`."""
    return is_held(Path(path) / LOCK)


def is_held(file: Path) -> bool:
    """Whether a living process holds the lock of a file."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def json_line(value: dict) -> bytes:
    """One line of strict JSON in UTF-8: NaN and infinity become null, lone surrogates stay
    escaped.
    """
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def json_text(value: dict) -> bytes:
    """The same for a whole indented file."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, indent=2)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def finite(value: object) -> object:
    """`value` with what JSON cannot say replaced: non-finite numbers by None, paths by text,
    scalars by numbers.
    """
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float):  # numpy's float64 is one; float() makes it plain
        return float(value) if abs(value) < float("inf") else None
    if value is None or isinstance(value, str | bool | int):
        return value
    item = getattr(value, "item", None)  # scalars of numpy and torch
    return finite(item()) if callable(item) else str(value)


def _refuse_run(path: Path, replace: bool) -> None:
    if _is_run(path) and not replace:
        raise ConfigError(
            f"{path} already holds a run ({_describe_run(path)})",
            expected="an empty folder, or one that does not exist yet",
            mend=f"go on with it: {how_to_resume(path)}; or throw it away (--replace); or choose "
            "another output_dir",
        )


def how_to_resume(path: Path) -> str:
    """What goes on with the run in `path`: the command where it began it, which leaves its settings
    there, else a call from Python, with the same model and records.
    """
    if (config := path / CONFIG).is_file():
        command = f"lorica train --resume {shlex.quote(str(path))}"
        spread = _SPREAD.search(config.read_text(encoding="utf-8", errors="replace"))
        return f"torchrun ... -m {command}" if spread else command
    return f"lorica.train(..., output_dir={str(path)!r}, resume=True)"


def _make(path: Path) -> None:
    """The folder and its parents, each on the disk in the folder above it."""
    missing = [path, *path.parents]
    missing = missing[: next(i for i, p in enumerate(missing) if p.exists())]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def _refuse_unwritable(path: Path) -> None:
    """Raises OSError for a folder that cannot be made or written in: known before hours of work."""
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is not a folder")
    if os.statvfs(nearest).f_flag & os.ST_RDONLY:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _refuse_foreign(path: Path) -> None:
    names = sorted(entry.name for entry in path.iterdir())
    if not names or _is_run(path):
        return
    strangers = [
        name for name in names if name not in (*LAYOUT, LOCK) and not name.startswith(_TEMPORARY)
    ]
    if not strangers and _is_own_lock(path / LOCK):  # a run that never wrote its manifest
        return
    shown = strangers or names
    raise ConfigError(
        f"{path} is not empty and is not a run folder (it holds "
        f"{', '.join(shown[:5])}{' ...' if shown[5:] else ''})",
        expected="an empty folder, or one that does not exist yet",
        mend=f"choose another --output-dir, for instance {path / 'run'}",
    )


def _is_own_lock(path: Path) -> bool:
    """Whether Lorica made this lock. It is empty where a process was killed, or found the disk
    full, before its first word; nothing else was in the folder then.
    """
    try:
        first = path.read_bytes().partition(b"\n")[0]
        if not first:
            entries = (entry.name for entry in path.parent.iterdir())
            return all(name == LOCK or name.startswith(_TEMPORARY) for name in entries)
        return "boot_id" in json.loads(first)
    except (OSError, ValueError, TypeError):
        return False


def _is_run(path: Path) -> bool:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "lorica" in manifest


def _describe_run(path: Path) -> str:
    manifest = json.loads((path / MANIFEST).read_bytes())
    started = manifest.get("started", "at an unknown time")
    return f"status {manifest.get('status', 'unknown')}, started {started}"


def _lock(path: Path) -> int:
    try:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(path, error) from error
    for attempt in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if attempt + 1 < _LOCK_ATTEMPTS:
                time.sleep(_LOCK_PAUSE)
                continue
            error = _locked(path, descriptor)
            os.close(descriptor)
            raise error from None
        except OSError as error:
            os.close(descriptor)
            raise _unwritable(path, error) from error
    # the text only serves the message above; the lock is the flock. A full disk may leave it short
    with contextlib.suppress(OSError):
        line = json_line(_owner())
        os.pwrite(descriptor, line, 0)  # before it is cut, so that it is never empty again
        os.ftruncate(descriptor, len(line))
    return descriptor


def _locked(path: Path, descriptor: int) -> RunLocked:
    return RunLocked(
        f"{path} is in use by {_holder(descriptor)}",
        expected="one process per run folder",
        mend="wait for it or stop it, or choose another --output-dir",
    )


def _owner() -> dict:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot_id": boot.read_text().strip() if boot.exists() else "",
        "started": now(),
    }


def _holder(descriptor: int) -> str:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0).partition(b"\n")[0])
        text = f"process {owner['pid']} on {owner['host']} since {owner['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    return text + (" (this process)" if owner == _owner() | {"started": owner["started"]} else "")


def _unwritable(path: Path, error: OSError) -> LoricaError:
    return ConfigError(
        f"cannot write in {path}: {error.strerror}",
        expected="a folder that this user may write in, on a disk with space",
        mend="choose another --output-dir",
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def now() -> str:
    """The time of day in UTC, to the second, for people; durations come from the monotonic
    clock.
    """
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
