"""Merge from disk to disk, file by file and weight by weight: the model is never in memory.

The base is made without its weights (on the meta device), the adapters are put on it, and each
weight that they change is read, changed and written by itself. All others are copied. What is
written is what `merge` would have made of the model, in files of the same names as the base's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.activate import with_stages
from lorica.base.folder import INDEX
from lorica.errors import AdapterFileError
from lorica.files.safetensors_file import TensorFile
from lorica.files.stream import TensorWriter
from lorica.mix.merging import check_mergeable, judge_damage
from lorica.mix.report import MergedWeight, MergeReport
from lorica.mix.target import Target, merged, targets_of

SINGLE = "model.safetensors"


@dataclass(eq=False)
class DiskPlan:
    """How a base on the disk becomes the merged model.

    Attributes:
        model: the base without weights, with the adapters on it.
        shares: adapter -> weight.
        files: the weight files of the base, in order.
        names: file -> name of a tensor there -> its name in the model.
        targets: name of a tensor -> what writes it.
        more: tensors that no file of the base has: those that were tied, and new heads.
        apart: tied weights that must get values of their own.
        dtype: of the floating-point weights; None: as in the files.
    """

    model: nn.Module
    shares: Mapping[str, float]
    files: list[Path]
    names: dict[Path, dict[str, str]]
    targets: dict[str, Target]
    more: dict[str, str | None]
    apart: dict[str, list[str]]
    dtype: torch.dtype | None


def plan_on_disk(
    model: nn.Module,
    mixture: Mapping[str, float],
    files: list[Path],
    *,
    dtype: torch.dtype | None = None,
) -> DiskPlan | str:
    """How to merge adapters into the files of a base; or why it must be loaded for that.

    Args:
        model: the base as `base.load.empty_model` makes it, with the adapters attached.
        mixture: adapter -> weight.
        files: its *.safetensors.
        dtype: of the new files; None: that of the old ones.

    Raises:
        MergeError: the adapters cannot become weights, on the disk or in memory.
    """
    shares = with_stages(model, dict(mixture))
    targets = list(targets_of(model, shares))
    apart = check_mergeable(model, shares, targets, held=False)
    if not files:
        return "the weights of the base are not on this machine"
    names, problem = _names(model, files)
    if problem:
        return problem
    stored = {own for table in names.values() for own in table.values()}
    by_path = {target.path: target for target in targets}
    more: dict[str, str | None] = {}
    for path, target in by_path.items():
        if path in stored:
            continue
        tied = [other for other in _tied(model).get(path, []) if other in stored]
        if path in apart and tied:
            more[path] = tied[0]
        elif not tied and _is_whole_copy(target):
            more[path] = None
        elif not tied or not all(other in by_path for other in tied):
            return f"{path} has no tensor of its own in the files"
    lacking = [p for p in model.state_dict() if p not in stored and p not in more]
    lacking = [p for p in lacking if not any(o in stored for o in _tied(model).get(p, []))]
    if lacking:
        return f"the files name their tensors otherwise than the model ({lacking[0]})"
    return DiskPlan(model, shares, files, names, by_path, more, apart, dtype)


def merge_on_disk(plan: DiskPlan, folder: Path, *, force: bool = False) -> MergeReport:
    """Write the merged weights into an empty folder; the config is the caller's.

    Raises:
        MergeError: the update drowns in rounding; what was written is of no use then.
    """
    entries: dict[str, MergedWeight] = {}
    written: dict[str, str] = {}
    size = 0
    for file in plan.files:
        last = file is plan.files[-1]
        size += _write_file(plan, file, folder / file.name, plan.more if last else {}, entries)
        more = plan.more if last else {}
        written |= dict.fromkeys([*plan.names[file].values(), *more], file.name)
    if len(plan.files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(written.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    ordered = tuple(entries[path] for path in plan.targets if path in entries)
    report = MergeReport(plan.shares, ordered, tuple(plan.apart))
    judge_damage(report, force)
    return report


def _write_file(
    plan: DiskPlan,
    file: Path,
    new: Path,
    more: Mapping[str, str | None],
    entries: dict[str, MergedWeight],
) -> int:
    """One file of the base, with the changed weights in it; returns the bytes of its tensors."""
    with TensorFile(file) as old:
        table = plan.names[file]
        headers = {
            table[key]: (_dtype(entry.dtype, plan), entry.shape)
            for key, entry in old.entries.items()
        }
        for path in more:
            target = plan.targets[path]
            headers[path] = plan.dtype or torch.float32, tuple(target.parameter.shape)
            if more[path] is not None:
                headers[path] = _dtype_of(plan, more[path] or ""), headers[path][1]
        with TensorWriter(new, headers) as writer:
            for key in old.entries:
                own = table[key]
                tensor = old.read(key).to(headers[own][0])
                writer.write(own, _changed(plan, own, tensor, entries))
            for path, source in more.items():
                tensor = _read(plan, source, headers[path])
                writer.write(path, _changed(plan, path, tensor, entries))
        return writer.size


def _changed(plan: DiskPlan, path: str, tensor: Tensor, entries: dict[str, MergedWeight]) -> Tensor:
    """The tensor as the adapters make it. The parameter has its values for so long only."""
    target = plan.targets.get(path)
    if target is None:
        return tensor
    empty = target.parameter
    try:
        target.module._parameters[target.name] = nn.Parameter(tensor, requires_grad=False)
        new, entries[path] = merged(target)
        return new
    finally:
        target.module._parameters[target.name] = empty


def _read(plan: DiskPlan, name: str | None, header: tuple[torch.dtype, tuple[int, ...]]) -> Tensor:
    """A tensor of the base by its name in the model; zeros for one that replaces nothing."""
    if name is None:
        return torch.zeros(header[1], dtype=header[0])
    file, key = _place(plan, name)
    with TensorFile(file) as old:
        return old.read(key).to(header[0])


def _dtype_of(plan: DiskPlan, name: str) -> torch.dtype:
    file, key = _place(plan, name)
    with TensorFile(file) as old:
        return _dtype(old.entries[key].dtype, plan)


def _place(plan: DiskPlan, name: str) -> tuple[Path, str]:
    return next(
        (file, key)
        for file, table in plan.names.items()
        for key, own in table.items()
        if own == name
    )


def _dtype(stored: torch.dtype, plan: DiskPlan) -> torch.dtype:
    return plan.dtype if plan.dtype is not None and stored.is_floating_point else stored


def _names(model: Any, files: list[Path]) -> tuple[dict[Path, dict[str, str]], str]:
    """What the tensors of each file are called in the model; or why that is not known. A file of
    the bare stack of layers has names without the prefix that it has in a model with a head.
    """
    known, found = set(model.state_dict()), {}
    prefix = f"{getattr(model, 'base_model_prefix', '') or '-'}."
    for file in files:
        try:
            with TensorFile(file) as opened:
                keys = list(opened.entries)
        except AdapterFileError as error:
            return {}, error.what
        found[file] = {
            key: f"{prefix}{key}" if key not in known and f"{prefix}{key}" in known else key
            for key in keys
        }
    return found, ""


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Name of a parameter -> all names of the very same one."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: names for names in groups.values() for name in names}


def _is_whole_copy(target: Target) -> bool:
    """Whether the new weight does not depend on the old one."""
    return (
        len(target.parts) == 1
        and target.parts[0][0] == 1.0
        and (target.parts[0][1].method.replaces)
    )
