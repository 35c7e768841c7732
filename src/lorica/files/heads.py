"""An adapter folder without the heads that do not fit a model: those of another task.

A head that was trained whole beside an adapter (`modules_to_save`) belongs to its task: another one
has other classes, or no such module. The rest of the adapter may still be a start for it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lorica.files.adapter import CONFIG, PROVENANCE, WEIGHTS, check_folder, read_facts
from lorica.files.folder import read_json
from lorica.files.peft_layout import PREFIX, modules_of
from lorica.files.safetensors_file import TensorFile, write_tensors
from lorica.methods.copy import Copy

Shape = tuple[int, ...]


@contextmanager
def fitting(model: nn.Module, folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """The folder, or a copy of it without the modules that `model` has not, or has in other sizes;
    and which these are.

    Raises:
        AdapterFileError: the folder holds no adapter.
    """
    check_folder(folder)
    raw, facts = read_json(folder / CONFIG), read_facts(folder)
    with TensorFile(folder / WEIGHTS, allow_empty=True) as file:
        shapes = {key: tuple(entry.shape) for key, entry in file.entries.items()}
        native = isinstance(raw.get("places"), dict)
        heads = _native_heads(raw, shapes) if native else _heads(raw, shapes)
        left = [name for name, keys in heads.items() if not _fits(model, keys, shapes)]
        if not left or "on" in facts:
            yield folder, []
            return
        gone = {key for name in left for key in heads[name].values()}
        kept = {key: file.read(key) for key in shapes if key not in gone}
    with tempfile.TemporaryDirectory() as temporary:
        reduced = Path(temporary)
        write_tensors(reduced / WEIGHTS, kept)
        config = _without(raw, left, native)
        (reduced / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        if facts:
            (reduced / PROVENANCE).write_text(json.dumps(facts), encoding="utf-8")
        yield reduced, left


Keys = Mapping[str, str]
"""Path of a parameter -> key in the file."""


def _heads(raw: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Keys]:
    """The keys of every module of `modules_to_save`."""
    found: dict[str, Keys] = {}
    names = raw.get("modules_to_save") or ()
    for name in names if isinstance(names, list) else ():
        keys = {key.removeprefix(PREFIX): key for key in shapes}
        inside = {path: key for path, key in keys.items() if f".{name}." in f".{path}"}
        if inside:
            found[name] = inside
    return found


def _native_heads(raw: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Keys]:
    places = raw["places"]
    if raw.get("kind") in ("selective", "lisa"):  # whose copies are the adapter itself
        return {}
    copies = [
        path
        for path, entry in places.items()
        if isinstance(entry, dict) and entry.get("kind") == Copy.kind
    ]
    return {path: {key: key for key in shapes if key.startswith(f"{path}.")} for path in copies}


def _fits(model: nn.Module, keys: Keys, shapes: Mapping[str, Shape]) -> bool:
    """Whether the model has all these parameters, in the sizes of the file."""
    modules = modules_of(model)
    for path, key in keys.items():
        owner, _, name = path.rpartition(".")
        module = modules.get(owner)
        own = module._parameters.get(name) if module is not None else None
        if own is None or tuple(own.shape) != shapes[key]:
            return False
    return True


def _without(raw: Mapping[str, Any], left: list[str], native: bool) -> dict[str, Any]:
    """The config without these modules."""
    config = dict(raw)
    if native:
        config["places"] = {p: e for p, e in raw["places"].items() if p not in left}
        settings = dict(raw["settings"])
        names = settings.get("modules_to_save") or ()
        settings["modules_to_save"] = [
            name for name in names if not any(f".{p}".endswith(f".{name}") for p in left)
        ]
        config["settings"] = settings
    else:
        config["modules_to_save"] = [n for n in raw["modules_to_save"] if n not in left]
    return config
