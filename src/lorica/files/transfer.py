"""Transfer: the tensors of a trained adapter as the start of another one.

Such as an adapter of a large task for a small one that is like it: Vu et al. 2022, "SPoT: Better
Frozen Model Adaptation through Soft Prompt Transfer" (arXiv 2110.07904).
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lorica.attach.attach import detach
from lorica.attach.handle import Adapter, adapters
from lorica.errors import AdapterFileError
from lorica.files.adapter import digest_of, load_adapter
from lorica.files.heads import fitting
from lorica.methods.copy import Copy
from lorica.methods.tokens import Tokens

_SHOWN = 10
_COPIES = {"selective", "lisa"}
_SAME_TENSORS = ({"lora", "lora-fa"}, _COPIES, {"prompt-tuning", "p-tuning"})
"""Kinds that differ in how they train only; their files are the same."""


def begin_from(adapter: Adapter, folder: str | Path, *, partly: bool = False) -> list[str]:
    """Put the tensors of the adapter in `folder` into `adapter`, which was attached before.

    Both must be of one kind, with the same places and ranks. A module that is trained whole beside
    them (a new head) and rows of tokens keep their own start where the folder has none, and that is
    said. What was
    begun from goes into the adapter's files.

    Args:
        partly: take what both have, and say what the one or the other has alone: other layers, and
            heads of another task.

    Returns:
        what the user should be told.

    Raises:
        AdapterFileError: the folder holds no adapter for this base, or one of another kind or of
            other shapes, or nothing that could be taken; all differences at once. The adapter is as
            it was.
    """
    folder, model = Path(folder), adapter.model
    name = _free_name(adapter)
    with fitting(model, folder) if partly else nullcontext((folder, [])) as (readable, left):
        source = load_adapter(model, readable, name=name)
    try:
        kept, extra = _check(adapter, source, folder, partly)
        taken = [path for path, slot in adapter.slots.items() if slot.tensors and path not in kept]
        with torch.no_grad():
            for path in taken:
                for key, tensor in adapter.slots[path].tensors.items():
                    tensor.copy_(source.slots[path].tensors[key])
    finally:
        detach(model, source)
    adapter.began_from = {"path": str(folder.absolute()), "digest": digest_of(folder)}
    adapter.reason = f"{adapter.reason}; begun from {folder}"
    notes = [f"the tensors of {folder}, at {len(taken)} places"]
    heads = [path for path in taken if isinstance(adapter.slots[path].method, Copy)]
    if heads and adapter.method.kind not in _COPIES:
        notes[0] += f", {_listed(heads)} among them"
    if kept:
        notes.append(f"{_listed(kept)} keep a start of their own: {folder} has nothing there")
    if extra:
        notes.append(f"not taken, since this run adapts nothing there: {_listed(extra)}")
    if left:
        notes.append(f"not taken, since the base has none or another one here: {_listed(left)}")
    return notes


def _listed(paths: Collection[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(sorted(paths)[:_SHOWN]) + more


def _free_name(adapter: Adapter) -> str:
    taken = adapters(adapter.model)
    return next(name for i in range(len(taken) + 1) if (name := f"begin-{i}") not in taken)


def _check(
    adapter: Adapter, source: Adapter, folder: Path, partly: bool
) -> tuple[set[str], set[str]]:
    """Places that keep their own start, and those of the source that are not taken; refuses what
    differs.
    """
    ours, theirs = adapter.method.kind, source.method.kind
    problems = []
    if source.on is not None:
        problems.append(f"it was trained on top of {source.on.method.kind}, which would be lost")
    if ours != theirs and {ours, theirs} not in _SAME_TENSORS:
        problems.append(f"it is {theirs}, and this run trains {ours}")
    heads = {
        path
        for path, slot in adapter.slots.items()
        if isinstance(slot.method, Copy | Tokens)
        and ours not in _COPIES
        and path not in source.slots
    }
    extra = source.slots.keys() - adapter.slots.keys()
    if partly:
        heads |= adapter.slots.keys() - source.slots.keys()
    if not problems:
        for path, slot in adapter.slots.items():
            if path not in heads and not problems[_SHOWN:]:
                problems += _differing(path, source.slots.get(path), slot)
        if not partly:
            problems += [f"{path}: this run adapts nothing there" for path in sorted(extra)]
        elif heads >= adapter.slots.keys():
            problems.append("it has nothing at any of the places that this run adapts")
    if problems:
        raise AdapterFileError(
            f"init_adapter: {folder} is no start for this adapter",
            problems=problems[:_SHOWN],
            mend="give the method, the ranks (r and rank_pattern, say), lora_alpha and "
            "target_modules that the folder's adapter_config.json has, or leave init_adapter out",
        )
    return heads, set(extra)


def _shapes(slot: Any) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in slot.tensors.items()}


def _scale(slot: Any) -> float:
    """What multiplies the update of a method with factors; 1 where there is no such number."""
    return round(float(getattr(slot.method, "scale", 1.0)), 9)


def _differing(path: str, other: Any, slot: Any) -> list[str]:
    """What keeps the tensors of another adapter from being those of a place, at most one thing."""
    if other is None:
        return [f"{path}: it has nothing there"]
    ranks = [getattr(one.method, "r", None) for one in (other, slot)]
    if None not in ranks and ranks[0] != ranks[1]:
        return [f"{path}: its r is {ranks[0]}, here it is {ranks[1]}"]
    folded = getattr(slot.method, "folded", None)
    if folded in other.tensors and folded not in slot.tensors:
        return [
            f"{path}: the network that made its {folded} is not in files: only prompt-tuning, and "
            "prefix-tuning without prefix_projection, begin from one"
        ]
    if _shapes(other) != _shapes(slot):
        return [f"{path}: it holds {_shapes(other)}, here it is {_shapes(slot)}"]
    if _scale(other) != _scale(slot):
        return [f"{path}: its scale is {_scale(other):g}, here it is {_scale(slot):g}"]
    return []
