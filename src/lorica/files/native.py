"""Our own layout, for every method: settings, places, and tensors under PATH.NAME.

adapter_config.json          {"format": "lorica", "version": 1, "kind": "vera",
                              "settings": {...}, "places": {PATH: {"core": MODULE,
                              "parameter": null or NAME, "kind": "vera" or "copy"}}, ...}
adapter_model.safetensors    PATH.NAME, such as model.layers.0.mlp.up_proj.d
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lorica.attach.gates import is_gated, stack_of
from lorica.attach.handle import Adapter, tied_to
from lorica.attach.intervene import is_intervention
from lorica.attach.layers import describe
from lorica.attach.places import Places, places_of
from lorica.attach.prompt import is_prompt
from lorica.config.resolve import build_method
from lorica.errors import AdapterFileError, ConfigError, LoricaError
from lorica.files.found import Found
from lorica.files.peft_layout import modules_of
from lorica.files.safetensors_file import TensorFile
from lorica.methods import METHODS
from lorica.methods.copy import Copy
from lorica.methods.method import Method, Tensors
from lorica.methods.tokens import Tokens

FORMAT, VERSION = "lorica", 1
_KEYS = {"format", "version", "kind", "settings", "places", "base_model_name_or_path", "task"}
_SHOWN = 10


def fits(adapter: Adapter) -> bool:
    """Every adapter can be written so."""
    return True


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config is of this layout."""
    return config.get("format") == FORMAT


def base_name(config: Mapping[str, Any]) -> str | None:
    """The base that the adapter was made for."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def write(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors. Raises AdapterFileError for an adapter on the model itself."""
    modules = modules_of(adapter.model)
    places, tensors = {}, {}
    for path, slot in adapter.slots.items():
        if not path:
            raise AdapterFileError(
                "the adapter sits on the model itself, which has no path",
                mend="put the model inside another module",
            )
        core, parameter = (path, None) if path in modules else path.rpartition(".")[::2]
        places[path] = {"core": core, "parameter": parameter, "kind": slot.method.kind}
        if isinstance(slot.method, Copy) and slot.method.only is not None:
            places[path]["only"] = list(slot.method.only)
        if isinstance(slot.method, Tokens):
            places[path]["indices"] = list(slot.method.indices)
        if (tie := tied_to(slot)) is not None:
            places[path]["tied_to"] = tie
            continue
        tensors |= {f"{path}.{name}": _plain(tensor) for name, tensor in slot.tensors.items()}
    config = {
        "format": FORMAT,
        "version": VERSION,
        "kind": adapter.method.kind,
        "settings": dataclasses.asdict(adapter.method),  # type: ignore[call-overload]
        "places": places,
        "base_model_name_or_path": adapter.base.get("name") or None,
        "task": adapter.base.get("task") or None,
    }
    return config, tensors


def settings(raw: Mapping[str, Any], folder: Path) -> Method:
    """The settings that a config describes. Raises AdapterFileError for what we do not know."""
    return _method(raw, folder)


def read(model: nn.Module, raw: Mapping[str, Any], file: TensorFile, folder: Path) -> Found:
    """Check settings, places and shapes, then read the tensors.

    Raises:
        AdapterFileError: something does not fit; all problems at once.
    """
    method = _method(raw, folder)
    modules, problems = modules_of(model), list[str]()
    there = {key: tuple(entry.shape) for key, entry in file.entries.items()}
    places: Places = {}
    wanted: dict[str, Tensors] = {}
    for path, entry in sorted(_entries(raw, folder).items(), key=_is_tied):
        try:
            places[path], wanted[path] = _place(modules, path, entry, method, there)
            problems += _tie_problems(path, places)
        except (AdapterFileError, ConfigError) as error:
            problems.append(f"{path}: {error.what}")
    problems = problems or _misplaced(model, method, places)
    keys = {f"{path}.{name}": t for path, own in wanted.items() for name, t in own.items()}
    problems += [f"{key}: missing from the file" for key in keys if key not in there]
    problems += [f"{key}: has no place" for key in there if key not in keys and not problems]
    problems += [
        f"{key}: {there[key]}, but this base needs {tuple(tensor.shape)}"
        for key, tensor in keys.items()
        if key in there and there[key] != tuple(tensor.shape)
    ]
    if problems or not places:
        raise AdapterFileError(
            f"{folder} does not fit this {type(model).__name__}",
            problems=problems[:_SHOWN] or ["the file holds no tensors"],
            mend="load the base that the adapter was made for",
        )
    tensors = {
        path: {name: _wide(file.read(f"{path}.{name}")) for name in own}
        for path, own in wanted.items()
    }
    for path in tensors:
        module, parameter, own = places[path]
        check: Any = getattr(own, "tensor_problems", lambda tensors, layer: [])
        if found := check(tensors[path], describe(module, parameter)):
            raise AdapterFileError(f"{folder}: {path}: {'; '.join(found)}")
    task = raw.get("task")
    return Found(method, places, tensors, base_name(raw), task if isinstance(task, str) else None)


def _misplaced(model: nn.Module, method: Method, places: Places) -> list[str]:
    """What sits on the stack of layers or on blocks acts as one: no place of it may be missing."""
    if not is_prompt(method) and not is_intervention(method) and not is_gated(method):
        return []
    try:
        if not is_prompt(method) and is_gated(method):  # of its layers there may be any
            lacking = stack_of(model, method).keys() - places.keys()
            return [f"{path}: has no entry, and gates need it" for path in lacking]
        wanted = places_of(model, method)[0].keys()
    except LoricaError as error:
        return [error.what, *error.problems]
    return [
        f"{path}: {'has no entry' if path in wanted else 'the settings name no such place'}"
        for path in sorted(wanted ^ places.keys())
    ]


def _method(raw: Mapping[str, Any], folder: Path) -> Method:
    """The settings object that the config describes."""
    problems = [f"unknown key {key[:60]!r}" for key in raw if key not in _KEYS]
    kind, settings = raw.get("kind"), raw.get("settings")
    if raw.get("version") != VERSION:
        problems.append(f"version is {str(raw.get('version'))[:20]!r}; only {VERSION} is read")
    if not isinstance(kind, str) or kind not in METHODS:
        problems.append(f"kind is {str(kind)[:40]!r}; there are {', '.join(METHODS)}")
    if not isinstance(settings, dict):
        problems.append("settings are missing")
    if not problems:
        assert isinstance(kind, str) and isinstance(settings, dict)
        try:
            return build_method(METHODS[kind], settings)
        except ConfigError as error:
            problems = [error.what, *error.problems]
    raise AdapterFileError(
        f"{folder / 'adapter_config.json'} cannot be used", problems=problems[:_SHOWN]
    )


def _entries(raw: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    found = raw.get("places")
    if isinstance(found, dict) and all(isinstance(entry, dict) for entry in found.values()):
        return found
    raise AdapterFileError(
        f"{folder / 'adapter_config.json'} cannot be used", problems=["places are missing"]
    )


def _place(
    modules: Mapping[str, nn.Module],
    path: str,
    entry: Mapping[str, Any],
    method: Method,
    there: Mapping[str, tuple[int, ...]],
) -> tuple[tuple[nn.Module, str | None, Method], Tensors]:
    """The place that an entry names, and what its tensors must look like."""
    core, parameter = entry.get("core"), entry.get("parameter")
    if not isinstance(core, str) or core not in modules:
        raise AdapterFileError("the base has no such module")
    module = modules[core]
    if path != (core if parameter is None else f"{core}.{parameter}"):
        raise AdapterFileError("its core and parameter name another place")
    if parameter is not None and module._parameters.get(str(parameter)) is None:
        raise AdapterFileError(f"{core} has no parameter {str(parameter)[:40]!r}")
    own = _own(path, parameter, entry, method)
    if entry.get("kind") != own.kind:
        raise AdapterFileError(f"kind is {str(entry.get('kind'))[:40]!r}, not {own.kind}")
    if hasattr(own, "sized"):  # how much there is, only the file knows
        head, growing = f"{path}.", cast(Any, own)
        shapes = {key.removeprefix(head): s for key, s in there.items() if key.startswith(head)}
        own = growing.sized(shapes)
    layer = describe(module, parameter)
    if found := own.problems(layer):
        raise AdapterFileError("; ".join(found))
    if getattr(own, "tied_to", None) is not None:
        return (module, parameter, own), {}
    # of virtual tokens there may be any number, and files come from strangers: sizes alone
    whole = layer.kind == "model"
    with FakeTensorMode(allow_non_fake_inputs=True) if whole else nullcontext():
        return (module, parameter, own), own.start(layer, torch.Generator())


def _own(path: str, parameter: str | None, entry: Mapping[str, Any], method: Method) -> Method:
    """The settings at one place."""
    tie = entry.get("tied_to")
    if not isinstance(tie, str | None):
        raise AdapterFileError("tied_to is no path")
    if entry.get("kind") == Tokens.kind:
        return _tokens(entry, tie)
    if entry.get("kind") != Copy.kind:
        return method.at(_name(path, parameter))
    only = entry.get("only")
    if only is None:
        return Copy(None, tie)
    if not isinstance(only, list) or not all(isinstance(name, str) for name in only):
        raise AdapterFileError("only is no list of names")
    return Copy(tuple(only), tie)


def _tokens(entry: Mapping[str, Any], tie: str | None) -> Tokens:
    indices = entry.get("indices")
    numbers = indices if isinstance(indices, list) else []
    sound = all(type(i) is int and i >= 0 for i in numbers) and numbers == sorted({*numbers})
    if not numbers or not sound:
        raise AdapterFileError("indices is no ascending list of tokens")
    return Tokens(tuple(numbers), tie)


def _is_tied(item: tuple[str, Mapping[str, Any]]) -> bool:
    """Whether a place shares the tensors of another one, which must be there first."""
    return item[1].get("tied_to") is not None


def _tie_problems(path: str, places: Places) -> list[str]:
    """Whether the place whose tensors this one shares is there, over the same weight."""
    module, _, own = places[path]
    if not isinstance(own, Copy | Tokens) or own.tied_to is None:
        return []
    owner, _, first = places.get(own.tied_to, (None, None, None))
    same = owner is not None and owner._parameters.get("weight") is module._parameters.get("weight")
    whole = isinstance(own, Tokens) or own.only == ("weight",)
    if same and whole and first == replace(own, tied_to=None):
        return []
    return [f"{path}: tied to {own.tied_to[:80]}, which does not hold the same of the same weight"]


def _name(path: str, parameter: str | None) -> str:
    """The name that settings match: of the layer, also where its weight is read."""
    return path.removesuffix(".weight") if parameter == "weight" else path


def _plain(tensor: Tensor) -> Tensor:
    return _wide(tensor.detach().cpu())


def _wide(tensor: Tensor) -> Tensor:
    """In float32; what is float64 or counts stays as it is."""
    keeps = tensor.dtype == torch.float64 or not tensor.is_floating_point()
    return tensor if keeps else tensor.float()
