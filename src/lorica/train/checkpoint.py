"""Checkpoints that are whole or absent.

    checkpoints/step-00000120/
        adapters/NAME.safetensors     what trains           optimizers/NAME.safetensors   moments of AdamW
        best/NAME.safetensors         the best so far       state.json                    counters of every adapter
        MANIFEST.json                 written last: size and SHA-256 of every file, and what run this belongs to

A checkpoint is written into a temporary folder, every file is fsynced, the manifest comes last, then the folder
is renamed and its parent fsynced. Reading goes from the newest to the oldest and trusts nothing but the hashes:
no "latest" pointer, no file times. A damaged checkpoint is set aside under another name and the next older one
is taken. Older ones are removed only after the new one was read back. There is no pickle in a checkpoint, and no
state of a random generator either: everything drawn in a step is seeded by the step.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lorica.errors import CheckpointError
from lorica.records.atomic import sync_folder, write_file

SCHEMA = 1
MANIFEST = "MANIFEST.json"
_PREFIX, _TEMPORARY, _BAD = "step-", ".tmp-step-", ".bad-step-"


@dataclass
class State:
    """Everything that a run needs to go on as if it had never stopped.

    Attributes:
        step: turns of the loop done.
        identity: what must be the same for the run to go on: digests and settings, by name.
        setting: what should be the same for the same bits (threads, versions), by name.
        counters: plain numbers of every adapter, by its name.
        adapters, optimizers, best: tensors by adapter and by name of the tensor.
    """

    step: int
    identity: dict[str, str]
    setting: dict[str, str] = field(default_factory=dict)
    counters: dict[str, dict] = field(default_factory=dict)
    adapters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    optimizers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    best: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def save(folder: Path, state: State, *, keep: int = 2) -> Path:
    """Write a checkpoint, read it back, then remove all but the newest `keep` (never fewer than 2).

    Raises:
        CheckpointError: it could not be written or does not read back; earlier ones are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{_PREFIX}{state.step:08d}"
    temporary = folder / f"{_TEMPORARY}{state.step:08d}-{secrets.token_hex(4)}"
    if target.exists() and _verify(target) is None:
        return target
    try:
        _write(temporary, state)
        if target.exists():
            os.rename(target, folder / f"{_BAD}{state.step:08d}-{secrets.token_hex(4)}")
        os.rename(temporary, target)
        sync_folder(folder)
    except OSError as error:
        free = shutil.disk_usage(folder).free
        raise CheckpointError(
            f"the checkpoint of step {state.step} could not be written in {folder}: {error.strerror}",
            expected=f"space on the disk ({free:,} bytes are free)",
            mend="free space and resume; earlier checkpoints are untouched",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if fault := _verify(target):
        raise CheckpointError(f"the checkpoint of step {state.step} does not read back: {fault}")
    _prune(folder, max(2, keep))
    return target


def load(
    folder: Path, identity: dict[str, str], *, setting: dict[str, str] | None = None
) -> tuple[State | None, list[str]]:
    """The newest whole checkpoint, or None where there is none; and what the user should be told.

    Raises:
        CheckpointError: the checkpoint belongs to a run of other data, another base or other settings.
    """
    notes: list[str] = []
    for path in sorted(folder.glob(f"{_PREFIX}*"), reverse=True) if folder.is_dir() else []:
        if fault := _verify(path):
            aside = folder / f"{_BAD}{path.name.removeprefix(_PREFIX)}-{secrets.token_hex(4)}"
            os.rename(path, aside)
            notes.append(f"{path.name} is damaged ({fault}); it was set aside as {aside.name}")
            continue
        state = _read(path)
        _check_identity(state.identity, identity)
        changed = [k for k, v in (setting or {}).items() if state.setting.get(k) != v]
        if changed:
            notes.append(
                f"going on with another {', '.join(changed)}: the result will not be the same to the bit"
            )
        return state, notes
    return None, notes


def clean(folder: Path) -> None:
    """Remove what a stopped process left half-written. Only under the lock of the run folder."""
    for path in folder.glob(f"{_TEMPORARY}*") if folder.is_dir() else []:
        shutil.rmtree(path, ignore_errors=True)


def _write(temporary: Path, state: State) -> None:
    groups = {"adapters": state.adapters, "optimizers": state.optimizers, "best": state.best}
    files: dict[str, bytes] = {}
    for group, by_name in groups.items():
        for name, tensors in by_name.items():
            plain = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
            files[f"{group}/{name}.safetensors"] = safetensors.torch.save(plain)
    files["state.json"] = json.dumps(
        {"counters": state.counters}, indent=1, sort_keys=True
    ).encode()
    for name, content in files.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(temporary / name, content)
    manifest = {
        "schema": SCHEMA,
        "step": state.step,
        "identity": state.identity,
        "setting": state.setting,
        "files": {
            n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()
        },
    }
    write_file(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
    sync_folder(temporary)


def _verify(path: Path) -> str | None:
    """What is wrong with a checkpoint; None where every file is as its manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["schema"] != SCHEMA:
            return f"its schema is {manifest['schema']}, this version reads {SCHEMA}"
        for name, entry in manifest["files"].items():
            content = (path / name).read_bytes()
            if (
                len(content) != entry["bytes"]
                or hashlib.sha256(content).hexdigest() != entry["sha256"]
            ):
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _read(path: Path) -> State:
    manifest = json.loads((path / MANIFEST).read_bytes())
    state = State(manifest["step"], manifest["identity"], manifest["setting"])
    state.counters = json.loads((path / "state.json").read_bytes())["counters"]
    try:
        for group in ("adapters", "optimizers", "best"):
            for file in sorted((path / group).glob("*.safetensors")):
                getattr(state, group)[file.stem] = safetensors.torch.load(file.read_bytes())
    except SafetensorError as error:
        raise CheckpointError(f"{path} holds a file that is no safetensors: {error}") from error
    return state


def _check_identity(found: dict[str, str], wanted: dict[str, str]) -> None:
    problems = [
        f"{key}: the checkpoint has {_short(found.get(key))}, this run {_short(wanted.get(key))}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if problems:
        raise CheckpointError(
            "the checkpoint belongs to another run",
            problems=problems,
            mend="resume with the same model, data and settings, or start anew in another --output-dir",
        )


def _short(value: str | None) -> str:
    return "nothing" if value is None else value if len(value) <= 60 else value[:57] + "..."


def _prune(folder: Path, keep: int) -> None:
    whole = sorted(folder.glob(f"{_PREFIX}*"), reverse=True)
    for path in whole[keep:]:
        doomed = folder / f"{_TEMPORARY}{path.name.removeprefix(_PREFIX)}-{secrets.token_hex(4)}"
        os.rename(
            path, doomed
        )  # a crash while deleting must not leave half a checkpoint under its name
        shutil.rmtree(doomed, ignore_errors=True)
