"""PEFT's layouts of the methods beside LoRA: AdaLoRA, VeRA, LoHa, LoKr, HiRA, IA3, RoAd.

They share one shape: `base_model.model.PATH.SUFFIX` for every tensor of a layer, and a config whose
target_modules select the layers. What differs stands in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorica.attach.handle import Adapter
from lorica.attach.layers import describe
from lorica.attach.places import Places
from lorica.base.storage import weight_shape
from lorica.config.resolve import build_method
from lorica.errors import AdapterFileError, ConfigError, nearest
from lorica.files import peft_ranks
from lorica.files.found import Found
from lorica.files.peft_config import PEFT_VERSION, TASK_TYPES, PeftConfig, parse_config
from lorica.files.peft_layout import PREFIX, modules_of
from lorica.files.peft_written import exact_names, whole_names
from lorica.files.safetensors_file import TensorFile
from lorica.methods.adalora import AdaLoRA
from lorica.methods.copy import Copy
from lorica.methods.hira import HiRA
from lorica.methods.ia3 import IA3
from lorica.methods.loha import LoHa
from lorica.methods.lokr import LoKr
from lorica.methods.method import Layer, Method, Tensors
from lorica.methods.patterns import unmatched_patterns
from lorica.methods.road import RoAd
from lorica.methods.vera import VeRA, projection

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


@dataclass(frozen=True)
class Kind:
    """One method in PEFT's words.

    Attributes:
        method: ours.
        layers: the classes of layers on which PEFT has it.
        settings: our name of a setting -> PEFT's.
        neutral: keys of PEFT that Lorica does not have, at the value that changes nothing.
        fixed: keys that are written besides.
        prefix: in front of our name of a tensor, in the key.
        has_exclusion: whether PEFT's config knows exclude_modules.
        has_groups: whether it has the method on grouped convolutions.
    """

    method: type
    layers: tuple[type, ...]
    settings: Mapping[str, str]
    neutral: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    has_exclusion: bool = True
    has_groups: bool = True

    def sits_on(self, module: nn.Module | None) -> bool:
        """Whether PEFT has it on a layer."""
        return isinstance(module, self.layers) and (
            self.has_groups or getattr(module, "groups", 1) == 1
        )


_LYCORIS = {
    "rank_dropout": 0.0,
    "module_dropout": 0.0,
    "use_effective_conv2d": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
_LAYERS_CHOSEN = {"layers_to_transform": None, "layers_pattern": None}
_PLAIN, _CONVOLVED = (nn.Linear, Conv1D), (nn.Linear, nn.Conv1d, nn.Conv2d)

KINDS: dict[str, Kind] = {
    "VERA": Kind(
        VeRA,
        _PLAIN,
        {key: key for key in ("r", "vera_dropout", "d_initial", "projection_prng_key")},
        {"bias": "none"},
        {"init_weights": True, "save_projection": True, **_LAYERS_CHOSEN},
        "vera_lambda_",
        has_exclusion=False,
    ),
    "LOHA": Kind(
        LoHa,
        _CONVOLVED,
        {"r": "r", "lora_alpha": "alpha"},
        _LYCORIS,
        {"init_weights": True, **_LAYERS_CHOSEN},
        "hada_",
    ),
    "LOKR": Kind(
        LoKr,
        _CONVOLVED,
        {
            "r": "r",
            "lora_alpha": "alpha",
            "decompose_both": "decompose_both",
            "decompose_factor": "decompose_factor",
        },
        _LYCORIS,
        {"init_weights": True, "rank_dropout_scale": False, **_LAYERS_CHOSEN},
        "lokr_",
    ),
    "HIRA": Kind(
        HiRA,
        (*_PLAIN, nn.Conv1d, nn.Conv2d, nn.Embedding),
        {"r": "r", "hira_dropout": "hira_dropout"},
        {"rank_pattern": {}},
        {"init_weights": True, **_LAYERS_CHOSEN},
        "hira_",
        has_groups=False,
    ),
    "IA3": Kind(IA3, (*_PLAIN, nn.Conv2d), {}, {}, {"init_ia3_weights": True}, "ia3_"),
    "ROAD": Kind(
        RoAd,
        (nn.Linear,),
        {"variant": "variant", "group_size": "group_size"},
        fixed={"init_weights": True},
        prefix="road_",
        has_exclusion=False,
    ),
    "ADALORA": Kind(
        AdaLoRA,
        (*_PLAIN, nn.Conv2d),
        peft_ranks.SETTINGS,
        peft_ranks.OTHER_VARIANTS,
        _LAYERS_CHOSEN,
        "lora_",
        has_groups=False,
    ),
}
_TRANSPOSING = ("ADALORA", "VERA", "HIRA", "IA3")
"""Those whose config says whether the weights are GPT-2's, stored (in, out)."""
_OPEN = ("tinit", "tfinal")
"""Left out of a config where Lorica decides them in a run."""


def _kind_of(method: Method) -> tuple[str, Kind] | None:
    return next(((n, kind) for n, kind in KINDS.items() if type(method) is kind.method), None)


# --- writing --------------------------------------------------------------------------------------


def fits(adapter: Adapter) -> bool:
    """Whether the adapter can be written in one of these layouts."""
    found = _kind_of(adapter.method)
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
    found = _kind_of(adapter.method)
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
            shape = _file_shape(name, key, tensor, layer, slot.method)
            tensors[f"{PREFIX}{path}.{_file_name(kind, key, layer)}"] = _plain(tensor).reshape(
                shape
            )
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


def _file_name(kind: Kind, key: str, layer: Layer) -> str:
    """PEFT's name of one of our tensors."""
    of_table = "embedding_" if kind.method is HiRA and layer.kind == "embedding" else ""
    return f"{kind.prefix}{of_table}{key}"


def _file_shape(name: str, key: str, tensor: Tensor, layer: Layer, method: Any) -> tuple[int, ...]:
    """PEFT's shape of one of our tensors."""
    shape = tuple(tensor.shape)
    kernel = layer.kernel_size
    if name == "IA3" and kernel:
        return (1, *shape, *(1 for _ in kernel))
    if name == "IA3":
        return (1, *shape) if method.on_input else (*shape, 1)
    if kernel and ((name == "LOKR" and key == "w2") or (name == "HIRA" and key == "A")):
        return (shape[0], -1, *kernel)
    if kernel and name == "HIRA":
        return (*shape, *(1 for _ in kernel))
    return shape


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
    plan = _Plan(model, kind, config, method)
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


class _Plan:
    """Which tensor of a file goes where, found by names and shapes alone."""

    def __init__(self, model: nn.Module, kind: Kind, config: PeftConfig, method: Any) -> None:
        self.kind, self.config, self.method = kind, config, method
        self.name = next(name for name, own in KINDS.items() if own is kind)
        self.modules = modules_of(model)
        self.places: Places = {}
        self.wanted: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
        """Path -> our name of a tensor -> its key, and our shape of it."""
        self.problems: list[str] = []

    def assign(self, file: TensorFile, given_up: Collection[str] = ()) -> None:
        """Fill `places` and `wanted`, or `problems`.

        Args:
            given_up: layers that the config selects, and the method left again.
        """
        entries = {
            key: tuple(entry.shape)
            for key, entry in file.entries.items()
            if key.removeprefix(PREFIX).rpartition(".")[0] not in given_up
        }
        shared = self._shared(file, entries) | self._repeated(file, entries)
        paths = self._paths(entries)
        layers = [describe(self.modules[path]) for path in paths]
        self.method = self.method.over(layers)
        for path, layer in zip(paths, layers, strict=True):
            self._layer(path, layer, entries)
        self._copies(entries)
        used = {key for own in self.wanted.values() for key, _ in own.values()} | shared
        lost = [key for key in entries if key not in used]
        self.problems += [f"{key}: has no place in this model" for key in lost]
        strange = unmatched_patterns(getattr(self.method, "rank_pattern", {}), paths)
        strange += [path for path in given_up if path not in self.modules]
        self.problems += [f"rank_pattern: {path} is no layer of the file" for path in strange]
        for path, module in self.modules.items():
            absent = self.kind.sits_on(module) and path not in self.places
            if absent and path not in given_up and self.config.selects(path):
                self.problems.append(f"{PREFIX}{path}: its tensors are missing from the file")

    def read(self, file: TensorFile, path: str) -> Tensors:
        """The tensors of one place, in our shapes."""
        return {
            name: _wide(file.read(key)).reshape(shape)
            for name, (key, shape) in self.wanted[path].items()
        }

    def _shared(self, file: TensorFile, entries: Mapping[str, tuple[int, ...]]) -> set[str]:
        """VeRA's random pair: it follows from the key, and must be the one that we make."""
        keys = ("base_model.vera_A", "base_model.vera_B")
        if self.name != "VERA" or not all(key in entries for key in keys):
            return set()
        (r, widest_in), (widest_out, _) = entries[keys[0]], entries[keys[1]]
        if r == self.method.r:
            self.method = build_method(
                VeRA, {**_settings(self.method), "widths": [widest_in, widest_out]}
            )
            pair = projection(self.method.projection_prng_key, r, widest_in, widest_out)
            if all(torch.equal(file.read(k).float(), p) for k, p in zip(keys, pair, strict=True)):
                return set(keys)
        self.problems.append(
            f"{keys[0]} and B: not the pair that projection_prng_key="
            f"{self.method.projection_prng_key} gives"
        )
        return set(keys)

    def _repeated(self, file: TensorFile, entries: Mapping[str, tuple[int, ...]]) -> set[str]:
        """The base's embeddings, which PEFT writes beside adapters on them: they must be ours."""
        found = set()
        for key, shape in entries.items():
            path, mark, _ = key.removeprefix(PREFIX).rpartition(".base_layer.weight")
            if not mark or not isinstance(self.modules.get(path), nn.Embedding):
                continue
            own = cast(Tensor, self.modules[path]._parameters["weight"]).detach().cpu()
            if shape != own.shape or not torch.equal(file.read(key).to(own.dtype), own):
                self.problems.append(f"{key}: the base of this adapter had other weights there")
            found.add(key)
        return found

    def _paths(self, entries: Mapping[str, tuple[int, ...]]) -> list[str]:
        """The layers that the file has tensors for, in the order of the model."""
        found = set()
        for key in entries:
            stem, mark, _ = key.removeprefix(PREFIX).rpartition(f".{self.kind.prefix}")
            if key.startswith(PREFIX) and mark:
                found.add(stem)
        return [
            path
            for path, module in self.modules.items()
            if path in found and self.kind.sits_on(module)
        ]

    def _layer(self, path: str, layer: Layer, entries: Mapping[str, tuple[int, ...]]) -> None:
        own = self.method.at(path)
        if self.config.selects(path) is False:
            self.problems.append(f"{PREFIX}{path}: the config does not name this place")
        if found := own.problems(layer):
            self.problems += [f"{path}: {problem}" for problem in found]
            return
        wanted = own.start(layer, torch.Generator())
        self.places[path] = self.modules[path], None, own
        self.wanted[path] = {}
        for name, tensor in wanted.items():
            key = f"{PREFIX}{path}.{_file_name(self.kind, name, layer)}"
            shape = _file_shape(self.name, name, tensor, layer, own)
            expected = tuple(tensor.reshape(shape).shape)
            if key not in entries:
                self.problems.append(f"{key}: missing from the file")
            elif entries[key] != expected:
                self.problems.append(f"{key}: {entries[key]}, but this base needs {expected}")
            self.wanted[path][name] = key, tuple(tensor.shape)

    def _copies(self, entries: Mapping[str, tuple[int, ...]]) -> None:
        """Modules trained whole."""
        for path, module in self.modules.items():
            if not path or not self.config.may_save_whole(path) or path in self.places:
                continue
            own = {
                name: weight_shape(module, name)
                for name, parameter in module._parameters.items()
                if parameter is not None
            }
            keys = {name: f"{PREFIX}{path}.{name}" for name in own}
            if not any(key in entries for key in keys.values()):
                continue
            self.places[path] = module, None, Copy()
            self.wanted[path] = {name: (key, own[name]) for name, key in keys.items()}
            for name, key in keys.items():
                if entries.get(key) != own[name]:
                    self.problems.append(f"{key}: missing, or not of {own[name]}")


def _settings(method: Any) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in fields(method)}


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
