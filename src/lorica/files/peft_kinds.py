"""PEFT's layouts of the methods beside LoRA.

They share one shape: `base_model.model.PATH.SUFFIX` for every tensor of a layer, and a config whose
target_modules select the layers. What differs stands in `peft_methods`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorica.attach.handle import Adapter
from lorica.attach.layers import describe
from lorica.config.resolve import build_method
from lorica.errors import AdapterFileError, ConfigError, nearest
from lorica.files import peft_ranks
from lorica.files.found import Found
from lorica.files.peft_config import PEFT_VERSION, TASK_TYPES, PeftConfig, parse_config
from lorica.files.peft_kinds_plan import Plan
from lorica.files.peft_layout import PREFIX, modules_of
from lorica.files.peft_methods import KINDS, Kind, file_name, file_shape, kind_of
from lorica.files.peft_written import exact_names, whole_names
from lorica.files.safetensors_file import TensorFile
from lorica.methods.adalora import AdaLoRA
from lorica.methods.copy import Copy
from lorica.methods.ia3 import IA3
from lorica.methods.method import Method
from lorica.methods.vera import projection

_SHOWN = 10
_PLACING = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "task_type",
    "base_model_name_or_path",
)
_SAYS_NOTHING = {
    "auto_mapping",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "init_weights",
    "init_ia3_weights",
    "fan_in_fan_out",
    "save_projection",
    "rank_dropout_scale",
}
_TRANSPOSING = ("ADALORA", "VERA", "HIRA", "IA3")
"""Those whose config says whether the weights are GPT-2's, stored (in, out)."""
_OPEN = ("tinit", "tfinal")
"""Left out of a config where Lorica decides them in a run."""


# --- writing --------------------------------------------------------------------------------------


def fits(adapter: Adapter) -> bool:
    """Whether the adapter can be written in one of these layouts."""
    found = kind_of(adapter.method)
    if found is None:
        return False
    modules, (_, kind) = modules_of(adapter.model), found
    own = {path for path, slot in adapter.slots.items() if not isinstance(slot.method, Copy)}
    layers = all(path and kind.sits_on(modules.get(path)) for path in own)
    if not layers or not own:
        return False
    transposed = {isinstance(modules[path], Conv1D) for path in own}
    excluded = exact_names(own, modules)[1]
    return len(transposed) == 1 and (kind.has_exclusion or not excluded)


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config is of one of these layouts."""
    return isinstance(config.get("peft_type"), str) and config["peft_type"] in KINDS


def may_be_empty(config: Mapping[str, Any]) -> bool:
    """Whether tensors without elements are sound there: where AdaLoRA left a layer no rank."""
    return config.get("peft_type") == "ADALORA"


def base_name(config: Mapping[str, Any]) -> str | None:
    """The base that the adapter was made for."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def write(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors, for an adapter that `fits`."""
    found = kind_of(adapter.method)
    assert found is not None
    name, kind = found
    modules, tensors, own = modules_of(adapter.model), dict[str, Tensor](), list[str]()
    for path, slot in adapter.slots.items():
        if isinstance(slot.method, Copy):
            tensors |= {f"{PREFIX}{path}.{key}": _plain(t) for key, t in slot.tensors.items()}
            continue
        own.append(path)
        layer = describe(modules[path])
        for key, tensor in slot.tensors.items():
            shape = file_shape(name, key, tensor, layer, slot.method)
            tensors[f"{PREFIX}{path}.{file_name(kind, key, layer)}"] = _plain(tensor).reshape(shape)
    if name == "VERA":
        method: Any = adapter.method
        pair = projection(method.projection_prng_key, method.r, *method.widths)
        tensors |= dict(zip(("base_model.vera_A", "base_model.vera_B"), pair, strict=True))
    return _config(adapter, name, kind, own, modules), tensors


def _config(
    adapter: Adapter, name: str, kind: Kind, own: list[str], modules: Mapping[str, nn.Module]
) -> dict[str, Any]:
    names, excluded = exact_names(own, modules)
    task_type = TASK_TYPES.get(adapter.base.get("task", ""))
    model = adapter.model
    base_class = {
        "base_model_class": type(model).__name__,
        "parent_library": type(model).__module__,
    }
    found = {
        **kind.neutral,
        **kind.fixed,
        "peft_type": name,
        "peft_version": PEFT_VERSION,
        "task_type": task_type,
        "auto_mapping": None if task_type else base_class,
        "base_model_name_or_path": adapter.base.get("name") or None,
        "inference_mode": True,
        "revision": None,
        "target_modules": names,
        "modules_to_save": whole_names(adapter) or None,
        **{theirs: getattr(adapter.method, ours) for ours, theirs in kind.settings.items()},
    }
    if kind.has_exclusion:
        found["exclude_modules"] = excluded or None
    if name in _TRANSPOSING:
        found["fan_in_fan_out"] = isinstance(modules[own[0]], Conv1D)
    if name == "ADALORA":
        ranks = {path: len(adapter.slots[path].tensors["E"]) for path in own}
        found |= peft_ranks.written(cast(AdaLoRA, adapter.method), ranks)
        found = {key: v for key, v in found.items() if key not in _OPEN or v is not None}
    if name == "IA3":
        slots: Any = adapter.slots
        scaled = [path for path in own if slots[path].method.on_input]
        found |= _feedforward(names, scaled, own)
    return dict(sorted(found.items()))


def _feedforward(names: list[str], scaled: list[str], own: list[str]) -> dict[str, Any]:
    """PEFT wants the names of feed-forward layers to be among the names of all, word for word."""

    def taken(name: str) -> set[str]:
        return {path for path in own if path == name or path.endswith(f".{name}")}

    within = [name for name in names if taken(name) and taken(name) <= set(scaled)]
    if set().union(*map(taken, within)) == set(scaled):
        return {"feedforward_modules": within}
    return {"target_modules": sorted(own), "feedforward_modules": sorted(scaled)}


# --- reading --------------------------------------------------------------------------------------


def settings(raw: Mapping[str, Any], folder: Path) -> Method:
    """The settings that a config describes. Raises AdapterFileError for what we do not know."""
    where = folder / "adapter_config.json"
    placing = {key: raw[key] for key in _PLACING if key in raw}
    config = parse_config({"peft_type": "LORA", **placing}, str(where))
    return _method(raw, KINDS[raw["peft_type"]], config, where)


def read(model: nn.Module, raw: Mapping[str, Any], file: TensorFile, folder: Path) -> Found:
    """Check settings, places and shapes, then read the tensors.

    Raises:
        AdapterFileError: something does not fit; all problems at once.
    """
    kind = KINDS[raw["peft_type"]]
    where = folder / "adapter_config.json"
    placing = {key: raw[key] for key in _PLACING if key in raw}
    config = parse_config({"peft_type": "LORA", **placing}, str(where))
    method = _method(raw, kind, config, where)
    plan = Plan(model, kind, config, method)
    plan.assign(file, peft_ranks.without_rank(raw) if kind.method is AdaLoRA else set())
    if plan.problems or not plan.wanted:
        raise AdapterFileError(
            f"{folder} does not fit this {type(model).__name__}",
            problems=plan.problems[:_SHOWN] or ["the file holds no tensors"],
            mend="load the base that the adapter was made for",
        )
    tensors = {path: plan.read(file, path) for path in plan.wanted}
    return Found(plan.method, plan.places, tensors, config.base_name, config.task)


def _method(raw: Mapping[str, Any], kind: Kind, config: PeftConfig, where: Path) -> Any:
    """Our settings, or an error with every key that means something Lorica does not know."""
    known = {*kind.settings.values(), *kind.neutral, *_PLACING, *_SAYS_NOTHING}
    known |= {"feedforward_modules"} if kind.method is IA3 else set()
    known |= {*peft_ranks.UNUSED, "rank_pattern"} if kind.method is AdaLoRA else set()
    problems = []
    for key, value in raw.items():
        if key in kind.neutral and value != kind.neutral[key] and value not in (None, False):
            problems.append(f"{key} is {str(value)[:60]!r}: it changes the arithmetic")
        elif key not in known and value not in (None, False) and value not in ([], {}):
            near = nearest(key, known)
            hint = f"; did the writer mean {near}?" if near else ""
            problems.append(f"unknown key {key[:60]!r} with the value {str(value)[:60]!r}{hint}")
    given = {ours: raw[theirs] for ours, theirs in kind.settings.items() if theirs in raw}
    if "lora_alpha" in kind.settings:
        given.setdefault("lora_alpha", 8)  # PEFT's default, which is not ours
    if kind.method is IA3:
        given["feedforward_modules"] = raw.get("feedforward_modules") or []
    if kind.method is AdaLoRA:
        ranks = peft_ranks.ranks_of(raw)
        problems += [ranks] if isinstance(ranks, str) else []
        given["target_r"] = peft_ranks.target_of(raw)
        given["rank_pattern"] = {} if isinstance(ranks, str) else peft_ranks.as_setting(raw, ranks)
    placed = {
        name: getattr(config.method, name)
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save")
    }
    if not problems:
        try:
            return build_method(kind.method, {**placed, **given})
        except ConfigError as error:
            problems = [error.what, *error.problems]
    raise AdapterFileError(f"{where} cannot be used", problems=problems[:_SHOWN])


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor if tensor.dtype == torch.float64 else tensor.float()
