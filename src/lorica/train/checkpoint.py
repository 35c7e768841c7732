"""Checkpoints that are whole or absent.

    checkpoints/step-00000120/
        adapters/NAME.safetensors   what trains        optimizers/NAME.safetensors  moments of AdamW
        best/NAME.safetensors       the best so far    state.json          counters of every adapter
        between/NAME.safetensors    what the method keeps from step to step, where it does
        MANIFEST.json               written last: size and SHA-256 of every file and of itself, and
                                    what run this belongs to

A checkpoint is written into a temporary folder, every file is fsynced, the manifest comes last,
then the folder is renamed and its parent fsynced. Reading goes from the highest step to the lowest
and trusts nothing but the hashes: no "latest" pointer, no file times. A damaged checkpoint is set
aside under another name and the next older one is taken; one that the system cannot read now (an
error of the disk, too many open files) is passed over and stays. Older ones are removed only after
the new one was read back. There is no pickle in a checkpoint, and no state of a random generator
either: everything drawn in a step is seeded by the step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lorica.config import TrainSettings
from lorica.errors import CheckpointError
from lorica.records.atomic import sync_folder, write_file

SCHEMA = 1
MANIFEST = "MANIFEST.json"
_STATE = "state.json"
_PREFIX, _TEMPORARY, _BAD = "step-", ".tmp-step-", ".bad-step-"
_NAME = re.compile(rf"{_PREFIX}(\d+)")
_GROUPS = ("adapters", "optimizers", "best", "between")
_FILE = re.compile(rf"{re.escape(_STATE)}|(?:{'|'.join(_GROUPS)})/[^./\\\0][^/\\\0]*\.safetensors")


class NoneWholeError(CheckpointError):
    """There are checkpoints, and every one is damaged; all were set aside."""


@dataclass
class State:
    """Everything that a run needs to go on as if it had never stopped.

    Attributes:
        step: turns of the loop done.
        identity: what must be the same for the run to go on: digests and settings, by name.
        circumstances: what should be the same for the same bits (threads, versions), by name.
        unjudged: the step was made, but its evaluation was left.
        asked: those who join before the next turn are in.
        seconds: spent in optimizer steps.
        director: what whoever decides about joining and leaving needs to go on.
        counters: plain numbers of every adapter, by its name.
        adapters, optimizers, best, between: tensors by adapter and by name of the tensor.
    """

    step: int
    identity: dict[str, str]
    circumstances: dict[str, str] = field(default_factory=dict)
    unjudged: bool = False
    asked: bool = False
    seconds: float = 0.0
    director: dict[str, Any] = field(default_factory=dict)
    counters: dict[str, dict] = field(default_factory=dict)
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    optimizers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    best: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    between: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def save(folder: Path, state: State, *, keep: int = 2) -> Path:
    """Write a checkpoint, read it back, then remove all but the newest `keep` (never below 2).

    A whole checkpoint of the same step stays as it is: a run writes the same bits again.

    Raises:
        CheckpointError: it could not be written or does not read back; earlier ones are untouched.
    """
    target = folder / f"{_PREFIX}{state.step:08d}"
    temporary = folder / f"{_TEMPORARY}{state.step:08d}-{secrets.token_hex(4)}"
    files = _files(state)
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
        if target.exists():
            if _verify(target) is None:
                return target
            _set_aside(target)
        _write(temporary, state, files)
        os.rename(temporary, target)
        sync_folder(folder)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {state.step} could not be written in {folder}: "
            f"{error.strerror or error}",
            expected=f"{sum(map(len, files.values())):,} bytes on a disk that takes them "
            f"({_free_bytes(folder)})",
            mend="free space and resume; earlier checkpoints are untouched",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        fault = _verify(target)
    except OSError as error:
        fault = f"{error.strerror or error}"
    if fault:
        raise CheckpointError(
            f"the checkpoint of step {state.step} does not read back: {fault}",
            mend="look after the disk and resume; earlier checkpoints are untouched",
        )
    with contextlib.suppress(OSError):  # one too many is no reason to stop
        _prune(folder, max(2, keep))
    return target


def load(
    folder: Path, identity: dict[str, str], *, circumstances: dict[str, str] | None = None
) -> tuple[State | None, list[str]]:
    """The newest whole checkpoint of this very run, and what the user should be told.

    Returns:
        None as the state where no checkpoint was ever written.

    Raises:
        CheckpointError: the checkpoint belongs to a run of other data, another base or other
            settings, or to another version of Lorica; or there are checkpoints, but none is whole.
    """
    state, notes = newest(folder)
    return state, notes + (check(state, identity, circumstances or {}) if state else [])


def check(state: State, identity: dict[str, str], circumstances: dict[str, str]) -> list[str]:
    """What the user should be told before a run goes on from a checkpoint.

    Raises:
        CheckpointError: it is that of a run of other data, another base or other settings.
    """
    _check_identity(state.identity, identity)
    changed = [
        f"another {key} ({before} before, {now} now)"
        for key, now in circumstances.items()
        if (before := state.circumstances.get(key, "unknown")) != now
    ]
    if not changed:
        return []
    return [f"going on with {', '.join(changed)}: the result will not be the same to the bit"]


def newest(folder: Path) -> tuple[State | None, list[str]]:
    """The newest whole checkpoint, of whatever run, and what the user should be told.

    Returns:
        None as the state where no checkpoint was ever written.

    Raises:
        CheckpointError: it is of another version of Lorica, or the system cannot read it now.
        NoneWholeError: there are some, but none is whole.
    """
    notes: list[str] = []
    unreadable: OSError | None = None
    for path in _newest_first(folder):
        try:
            if fault := _verify(path):
                notes.append(f"{path.name} is damaged ({fault}); {_out_of_the_way(path)}")
                continue
            state = _read(path)
        except OSError as error:
            unreadable = error
            notes.append(f"{path.name} cannot be read ({error.strerror}); it was passed over")
            continue
        return state, notes
    if unreadable is not None:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read",
            problems=notes,
            expected="a disk and a process that can read them; nothing was changed",
            mend="look after the cause and resume",
        ) from unreadable
    bad = sorted(path.name for path in folder.glob(f"{_BAD}*")) if folder.is_dir() else []
    if bad:
        raise NoneWholeError(
            f"no checkpoint in {folder} is whole",
            problems=notes or [f"{name} was set aside earlier" for name in bad],
            mend="start the run anew, or remove what was set aside to begin at step 0",
        )
    return None, notes


def newest_whole(folder: Path) -> Path | None:
    """The folder of the checkpoint that `newest` would read; nothing is changed."""
    for path in _newest_first(folder):
        with contextlib.suppress(OSError):
            if not _verify(path):
                return path
    return None


def clean(folder: Path) -> None:
    """Remove what a stopped process left half-written. Only under the lock of the run folder."""
    for path in folder.glob(f"{_TEMPORARY}*") if folder.is_dir() else []:
        shutil.rmtree(path, ignore_errors=True)


def _newest_first(folder: Path) -> list[Path]:
    """Checkpoints by falling step, whatever their file times."""
    found = folder.iterdir() if folder.is_dir() else []
    steps = {int(m[1]): path for path in found if (m := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def _out_of_the_way(path: Path) -> str:
    """Set a damaged checkpoint aside, and say what was done. Where that fails it stays, and is
    found damaged again the next time.
    """
    try:
        return f"it was set aside as {_set_aside(path).name}"
    except OSError as error:
        return f"it was passed over, for it cannot be renamed ({error.strerror})"


def _set_aside(path: Path) -> Path:
    number = path.name.removeprefix(_PREFIX)
    aside = path.with_name(f"{_BAD}{number}-{secrets.token_hex(4)}")
    os.rename(path, aside)
    return aside


def _files(state: State) -> dict[str, bytes]:
    """What a checkpoint consists of, but for the manifest: name -> content."""
    files: dict[str, bytes] = {}
    for group in _GROUPS:
        for name, tensors in getattr(state, group).items():
            plain = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
            files[f"{group}/{name}.safetensors"] = safetensors.torch.save(plain)
    numbers = {
        **{"counters": state.counters, "director": state.director},
        **{"unjudged": state.unjudged, "asked": state.asked, "seconds": state.seconds},
    }
    files[_STATE] = json.dumps(numbers, indent=1, sort_keys=True).encode()
    return files


def _write(temporary: Path, state: State, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(temporary / name, content)
    manifest = {
        "schema": SCHEMA,
        "step": state.step,
        "identity": state.identity,
        "circumstances": state.circumstances,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
    }
    manifest["sha256"] = _own_digest(manifest)
    write_file(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
    sync_folder(temporary)


def _own_digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _verify(path: Path) -> str | None:
    """What is wrong with a checkpoint; None where every file is as its manifest says.

    Raises:
        CheckpointError: another version of Lorica wrote it; that is no damage.
        OSError: the system cannot read it now; nor is that.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["sha256"] != _own_digest(manifest):
            return f"{MANIFEST} is not as it was written"
        if manifest["schema"] != SCHEMA:
            raise CheckpointError(
                f"{path} has the schema {_short(str(manifest['schema']))}; this version of Lorica "
                f"reads {SCHEMA}",
                mend="resume with the version that began the run",
            )
        if path.name != f"{_PREFIX}{manifest['step']:08d}":
            return f"it is the checkpoint of step {manifest['step']}"
        for name, entry in manifest["files"].items():
            if not _FILE.fullmatch(name):
                return f"{MANIFEST} names {name[:80]!r}, which is no part of a checkpoint"
            if not (path / name).is_file() and (path / name).exists():
                return f"{name} is no regular file"  # reading a FIFO would wait without end
            content = (path / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                return f"{name} is not as it was written"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def _read(path: Path) -> State:
    """A checkpoint that `_verify` found whole: the files of its manifest and no others.

    Raises:
        CheckpointError: its hashes are right and its contents are not: Lorica did not write it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        numbers = json.loads((path / _STATE).read_bytes())
        state = State(manifest["step"], manifest["identity"], manifest["circumstances"], **numbers)
        for table in (state.identity, state.circumstances, state.counters, state.director):
            if not isinstance(table, dict):
                raise TypeError(f"a {type(table).__name__} instead of a table")
        for word in (*state.identity.values(), *state.circumstances.values()):
            if not isinstance(word, str):
                raise TypeError(f"a {type(word).__name__} instead of a text")
        for name in manifest["files"]:
            group, _, file = name.rpartition("/")
            if group in _GROUPS:
                tensors = safetensors.torch.load((path / name).read_bytes())
                getattr(state, group)[file.removesuffix(".safetensors")] = tensors
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has the right hashes and the wrong contents: {str(error)[:200]}",
            expected="a checkpoint that Lorica wrote",
            mend="start the run anew",
        ) from error
    return state


def _check_identity(found: dict[str, str], wanted: dict[str, str]) -> None:
    problems = [
        f"{_short(key)}: the checkpoint has {_short(found.get(key))}, "
        f"this run {_short(wanted.get(key))}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if problems:
        raise CheckpointError(
            "the checkpoint belongs to another run",
            problems=problems,
            mend="resume with the same model, data and settings, or start anew in another "
            "--output-dir",
        )


def _short(value: str | None) -> str:
    return "nothing" if value is None else value if len(value) <= 60 else value[:57] + "..."


def space_warning(folder: Path, tensors: Iterable[Tensor], settings: TrainSettings) -> str | None:
    """What to tell where the disk will not hold the checkpoints, before hours of work."""
    size = 4 * sum(t.numel() * t.element_size() for t in tensors)  # two moments, and the best
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < 3 * size:
            return (
                f"{free:,} bytes are free in {folder}, and a checkpoint takes about {size:,}; up "
                f"to {max(2, settings.save_total_limit) + 1} lie there at a time"
            )
    return None


def _free_bytes(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,} bytes are free"
    except OSError:
        return "free bytes are unknown"


def _prune(folder: Path, keep: int) -> None:
    for path in _newest_first(folder)[keep:]:
        number = path.name.removeprefix(_PREFIX)
        doomed = folder / f"{_TEMPORARY}{number}-{secrets.token_hex(4)}"
        os.rename(path, doomed)  # a crash while deleting must not leave half of it under its name
        shutil.rmtree(doomed, ignore_errors=True)
