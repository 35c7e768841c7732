"""Merge from disk to disk, file by file and weight by weight: the model is never in memory.

The base is made without its weights (on the meta device), the adapters are put on it, and each
weight that they change is read, changed and written by itself. All others are copied. What is
written is what `merge` would have made of the model, in files of the same names as the base's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorica.attach.activate import with_stages
from lorica.base.folder import INDEX
from lorica.errors import AdapterFileError
from lorica.files.stored_weights import StoredWeights
from lorica.files.stream import TensorWriter
from lorica.mix.merging import check_mergeable, judge_damage
from lorica.mix.report import MergedWeight, MergeReport
from lorica.mix.target import Target, merged, targets_of


@dataclass(eq=False)
class DiskPlan:
    """How a base on the disk becomes the merged model.

    Attributes:
        model: the base without weights, with the adapters on it.
        shares: adapter -> weight.
        files: the weight files of the base, in order.
        targets: name of a tensor -> what writes it.
        more: tensors that no file of the base has, with the tensor whose values they had: those
            that were tied; None for what does not depend on the base, such as new heads.
        apart: tied weights that must get values of their own.
        dtype: of the floating-point weights; None: as in the files.
    """

    model: nn.Module
    shares: Mapping[str, float]
    files: list[Path]
    targets: dict[str, Target]
    more: dict[str, str | None]
    apart: dict[str, list[str]]
    dtype: torch.dtype | None

    def kind(self, stored: torch.dtype) -> torch.dtype:
        """The type in which a tensor is written."""
        return self.dtype if self.dtype is not None and stored.is_floating_point else stored


def plan_on_disk(
    model: nn.Module,
    mixture: Mapping[str, float],
    files: list[Path],
    *,
    dtype: torch.dtype | None = None,
) -> DiskPlan | str:
    """How to merge adapters into the files of a base; or why it must be loaded for that.

    Args:
        model: the base as `base.empty.empty_model` makes it, with the adapters attached.
        mixture: adapter -> weight.
        files: its *.safetensors.
        dtype: of the new files; None: that of the old ones.

    Raises:
        MergeError: the adapters cannot become weights, on the disk or in memory.
    """
    shares = with_stages(model, dict(mixture))
    targets = {target.path: target for target in targets_of(model, shares)}
    apart = check_mergeable(model, shares, list(targets.values()), held=False)
    if not files:
        return "the weights of the base are not on this machine"
    try:
        with StoredWeights(model, files) as stored:
            names = set(stored)
    except AdapterFileError as error:
        return error.what
    tied = _tied(model)
    more: dict[str, str | None] = {}
    for path, others in tied.items() if apart else ():  # the config has one switch for all ties
        twin = next((other for other in others if other in names), None)
        if path not in names and twin is not None:
            more[path] = twin
    for path, target in targets.items():
        if path in more or any(other in names for other in tied.get(path, [path])):
            continue
        if not _is_whole_copy(target):
            return f"the files name their tensors otherwise than the model ({path})"
        more[path] = None
    lacking = [
        path
        for path in model.state_dict()
        if path not in more and not any(other in names for other in tied.get(path, [path]))
    ]
    if lacking:
        return f"the files name their tensors otherwise than the model ({lacking[0]})"
    return DiskPlan(model, shares, files, targets, more, apart, dtype)


def merge_on_disk(plan: DiskPlan, folder: Path, *, force: bool = False) -> MergeReport:
    """Write the merged weights into an empty folder; the config is the caller's.

    Raises:
        MergeError: the update drowns in rounding; what was written is of no use then.
    """
    entries: dict[str, MergedWeight] = {}
    written: dict[str, str] = {}
    size = 0
    with StoredWeights(plan.model, plan.files) as stored:
        for file in plan.files:
            more = plan.more if file is plan.files[-1] else {}
            sources = {**{name: name for name in stored.files[file].values()}, **more}
            size += _write_file(plan, stored, sources, folder / file.name, entries)
            written |= dict.fromkeys(sources, file.name)
    if len(plan.files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(written.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for path, target in plan.targets.items():  # tied to one that was written, and the same
        if path not in entries:
            twin = next(entries[other] for other in _tied(plan.model)[path] if other in entries)
            entries[path] = replace(twin, path=target.path)
    ordered = tuple(entries[path] for path in plan.targets)
    report = MergeReport(plan.shares, ordered, tuple(plan.apart))
    judge_damage(report, force)
    return report


def _write_file(
    plan: DiskPlan,
    stored: StoredWeights,
    sources: Mapping[str, str | None],
    new: Path,
    entries: dict[str, MergedWeight],
) -> int:
    """One file: name of a tensor -> that of the base's tensor it is made of. Returns its bytes."""
    headers = {}
    for name, source in sources.items():
        if source is None:
            dtype = plan.dtype or torch.float32
            headers[name] = dtype, tuple(plan.targets[name].parameter.shape)
        else:
            dtype, shape = stored.kind(source)
            headers[name] = plan.kind(dtype), shape
    with TensorWriter(new, headers) as writer:
        for name, source in sources.items():
            dtype, shape = headers[name]
            given = torch.zeros(shape) if source is None else stored.read(source)
            writer.write(name, _changed(plan, name, given.to(dtype), entries))
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


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Name of a parameter -> all names of the very same one."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: names for names in groups.values() for name in names}


def _is_whole_copy(target: Target) -> bool:
    """Whether the new weight does not depend on the old one."""
    share, slot = target.parts[0]
    return len(target.parts) == 1 and share == 1.0 and slot.method.replaces
