"""An adapter in the words of PEFT: its tensors under PEFT's keys, and the config that selects them.

The names in the config are the shortest with which PEFT's own matching selects exactly our places.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorica.attach.handle import Adapter
from lorica.attach.tokens import SETTING, Choice, rows_of
from lorica.errors import AdapterFileError
from lorica.files.peft_config import (
    HEADS_OF_PEFT,
    NEUTRAL,
    NO_EFFECT,
    PLAIN_INITS,
    TASK_TYPES,
)
from lorica.files.peft_layout import (
    LAYERS,
    PREFIX,
    ROWS,
    Spot,
    bare_spot,
    below_attention,
    locate,
    modules_of,
)
from lorica.methods.copy import Copy
from lorica.methods.dora import DoRA
from lorica.methods.lora import LoRA
from lorica.methods.tokens import Tokens


@dataclass
class Written:
    """An adapter in PEFT's layout, and what its config needs to say.

    Attributes:
        tensors: by PEFT's keys.
        modules, parameters: path -> (rank, alpha) of what PEFT must select.
        whole: names for modules_to_save.
        unreadable: places that Lorica reads back and PEFT does not.
        has_conv1d: whether GPT-2's Conv1D is among the layers.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, tuple[int, float]] = field(default_factory=dict)
    parameters: dict[str, tuple[int, float]] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    has_conv1d: bool = False


def to_peft(adapter: Adapter) -> Written:
    """The tensors of an adapter under PEFT's keys.

    Raises:
        AdapterFileError: it sits on the model itself, which has no path.
    """
    modules = modules_of(adapter.model)
    found = Written()
    bare = _bare_parameters(adapter, modules)
    for rows in rows_of(adapter.model, _tokens_of(adapter)):
        slot = adapter.slots[rows.places[0]]
        found.tensors[f"{PREFIX}{rows.path}{ROWS}"] = _plain(slot.tensors["rows"])
    for path, slot in adapter.slots.items():
        if isinstance(slot.method, Tokens):
            continue
        if isinstance(slot.method, Copy):
            found.tensors.update(
                {f"{PREFIX}{path}.{n}": _plain(t) for n, t in slot.tensors.items()}
            )
            continue
        core, parameter = _core(path, modules)
        if not core or not isinstance(slot.method, LoRA):
            raise AdapterFileError(
                f"{path or 'the model'}: {slot.method.kind} here has no name in PEFT's layout",
                mend="put the model inside another module" if not core else None,
            )
        names = bare.get(core, [])
        spot = _spot_of(modules, core, parameter, names)
        if spot.is_bare:
            found.parameters[spot.matched] = slot.method.r, slot.method.lora_alpha
            if spot.layer.kind != "experts":
                found.unreadable += [path] if below_attention(modules, core) else []
        else:
            found.modules[spot.matched] = slot.method.r, slot.method.lora_alpha
        found.has_conv1d |= isinstance(modules[core], Conv1D)
        found.tensors.update(
            spot.to_file({name: _plain(tensor) for name, tensor in slot.tensors.items()})
        )
    found.whole = whole_names(adapter)
    found.unreadable += [name for name in found.whole if _caught_besides(name, adapter)]
    _fill_attention(found, modules)
    return found


def _tokens_of(adapter: Adapter) -> Choice:
    return getattr(adapter.method, SETTING, ())


def _core(path: str, modules: Mapping[str, nn.Module]) -> tuple[str, str | None]:
    if path in modules:
        return path, None
    core, _, parameter = path.rpartition(".")
    return core, parameter


def _bare_parameters(adapter: Adapter, modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Module -> its parameters that must be named one by one, in the order of PEFT's wrappers."""
    names: dict[str, list[str]] = {}
    for path, slot in adapter.slots.items():
        core, parameter = _core(path, modules)
        if parameter is None or isinstance(slot.method, Copy | Tokens):
            continue
        module = modules[core]
        is_attention = isinstance(module, nn.MultiheadAttention)
        in_attention = is_attention or below_attention(modules, core)
        attention = core if is_attention else core.rpartition(".")[0]
        plain_layer = isinstance(module, LAYERS) and parameter == "weight"
        fits = _fits_wrapper(adapter, attention, modules) if in_attention else plain_layer
        if not fits:
            names.setdefault(core, []).append(parameter)
    return {
        core: [name for name in modules[core]._parameters if name in found]
        for core, found in names.items()
    }


def _fits_wrapper(adapter: Adapter, attention: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether PEFT's one wrapper can say what sits on this nn.MultiheadAttention."""
    if modules[attention].in_proj_weight is None:
        return False
    paths = (f"{attention}.in_proj_weight", f"{attention}.out_proj.weight")
    methods = [adapter.slots[path].method for path in paths if path in adapter.slots]
    return len({(m.r, m.lora_alpha) for m in methods if isinstance(m, LoRA)}) == 1


def _spot_of(
    modules: Mapping[str, nn.Module], core: str, parameter: str | None, names: list[str]
) -> Spot:
    if names:
        depth = len(names) - 1 - names.index(parameter or "")
        spot = bare_spot(modules, core, parameter or "", depth)
    else:
        spot = locate(modules, core)
    if isinstance(spot, str):
        raise AdapterFileError(f"{core} cannot be written: {spot}")
    return spot


def _fill_attention(found: Written, modules: Mapping[str, nn.Module]) -> None:
    """PEFT's wrapper of nn.MultiheadAttention has factors for both projections: zeros for none."""
    for path, (r, _) in list(found.modules.items()):
        if not isinstance(modules[path], nn.MultiheadAttention):
            continue
        for stem in (path, f"{path}.out_proj"):
            spot = locate(modules, stem)
            assert isinstance(spot, Spot)
            shapes = dict(zip("AB", spot.shapes(r), strict=True))
            for factor, shape in shapes.items():
                found.tensors.setdefault(spot.key(factor), torch.zeros(shape))


def whole_names(adapter: Adapter) -> list[str]:
    """Names for modules_to_save: the settings' own where PEFT selects by them what was copied and
    nothing else, else the full paths.
    """
    copied = _copied(adapter)
    names = [name for name in getattr(adapter.method, "modules_to_save", ()) if name]
    unnamed = [p for p in copied if not any(f".{name}." in f".{p}." for name in names)]
    found = set(unnamed)
    for name in names if copied else ():
        roots = [p for p in modules_of(adapter.model) if f".{p}".endswith(f".{name}")]
        found |= set(roots) if _caught_besides(name, adapter) else {name}
    return sorted(found)


def _copied(adapter: Adapter) -> list[str]:
    return [path for path, slot in adapter.slots.items() if isinstance(slot.method, Copy)]


def _caught_besides(name: str, adapter: Adapter) -> list[str]:
    """The modules without a copy that PEFT would train whole by this name: for modules_to_save
    its rule is a plain `endswith`, by which "norm" is input_layernorm too.
    """
    copied = [f"{path}." for path in _copied(adapter)]
    return [
        path
        for path in modules_of(adapter.model)
        if path.endswith(name) and not any(c.startswith(f"{path}.") for c in copied)
    ]


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def written_config(adapter: Adapter, written: Written) -> dict[str, Any]:
    """The contents of adapter_config.json, sorted. Raises AdapterFileError for another method."""
    method, model = adapter.method, adapter.model
    if not isinstance(method, LoRA):
        raise AdapterFileError(
            f"{method.kind} has no layout in PEFT", expected="an adapter of LoRA"
        )
    modules, parameters = written.modules, written.parameters
    all_modules = modules_of(model)
    all_parameters = [f"{path}.{name}" for path, m in all_modules.items() for name in m._parameters]
    base_class = {
        "base_model_class": type(model).__name__,
        "parent_library": type(model).__module__,
    }
    names, excluded = exact_names(modules, all_modules)
    ranks = {path: rank for path, (rank, _) in {**modules, **parameters}.items()}
    alphas = {path: alpha for path, (_, alpha) in {**modules, **parameters}.items()}
    task_type = TASK_TYPES.get(adapter.base.get("task", ""))
    heads = HEADS_OF_PEFT.get(task_type or "", ())
    if any(part in heads for path in (*modules, *parameters) for part in path.split(".")):
        task_type = None  # with it, PEFT would train the head whole and drop our factors there
    found = {
        **NEUTRAL,
        **{key: value for key, value in NO_EFFECT.items() if key != "runtime_config"},
        "peft_type": "LORA",
        "task_type": task_type,
        "auto_mapping": None if task_type else base_class,
        "base_model_name_or_path": adapter.base.get("name") or None,
        "r": method.r,
        "lora_alpha": method.lora_alpha,
        "lora_dropout": method.lora_dropout,
        "use_rslora": method.use_rslora,
        "use_dora": isinstance(method, DoRA),
        "init_lora_weights": next(
            theirs for theirs, ours in PLAIN_INITS.items() if ours == method.init_lora_weights
        ),
        "fan_in_fan_out": written.has_conv1d,
        "target_modules": names,
        "exclude_modules": excluded or None,
        "target_parameters": exact_names(parameters, all_parameters)[0] or None,
        "modules_to_save": written.whole or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": _pattern(ranks, method.r),
        "alpha_pattern": _pattern(alphas, method.lora_alpha),
        SETTING: _tokens_of(adapter) or None,
    }
    return dict(sorted(found.items()))


def exact_names(paths: Iterable[str], universe: Iterable[str]) -> tuple[list[str], list[str]]:
    """The shortest endings that select exactly `paths`, and the paths to exclude besides.

    PEFT's rule: a name takes the path that equals it, and every path that ends in "." + name. Where
    even the full path is the ending of another one, that other one is excluded by name.
    """
    wanted = set(paths)
    others = [path for path in universe if path not in wanted]
    taken = {ending for path in others for ending in _endings(path)}
    free = (
        [e for e in _endings(path) if e not in taken and not e.isdigit()] or [path]
        for path in wanted
    )
    names = {endings[0] for endings in free}
    caught = [path for path in others if any(e in names for e in _endings(path))]
    excluded = exact_names(caught, wanted)[0] if caught else []
    return sorted(names), excluded


def _endings(path: str) -> list[str]:
    """All endings of a path at a dot, the shortest first, the whole path last."""
    parts = path.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A rank_pattern or alpha_pattern: exact endings for every value that is not the default."""
    found: dict[str, Any] = {}
    for value in {v for v in values.values() if v != default}:
        names, ambiguous = exact_names((p for p, v in values.items() if v == value), values)
        for name in names:  # nothing can be excluded here, but a regular expression has a start
            whole_path = ambiguous and name in values
            found[f"^{re.escape(name)}" if whole_path else name] = value
    return dict(sorted(found.items()))
