"""Adapters of AdapterHub's package `adapters`, for encoders with BERT's names of layers.

    LoRA          PATH.loras.NAME.lora_A (R, I)    PATH.loras.NAME.lora_B (O, R)
    bottlenecks   PARENT.adapters.NAME.adapter_down.0.weight (M, H)    .bias (M,)
                  PARENT.adapters.NAME.adapter_up.weight (H, M)        .bias (H,)

PARENT is the module around a layer's output projection. There the bottleneck of double_seq_bn sits
as ours does, before the residual sum; that of seq_bn sits behind it unless original_ln_before is
off, and is no adapter of ours.

Legend: I in features, O out features, R rank, H width of the model, M width of the bottleneck.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.handle import Adapter
from lorica.attach.places import Places
from lorica.errors import AdapterFileError, LoricaWarning
from lorica.files.folder import new_folder, read_json
from lorica.files.found import Found
from lorica.files.pairs import Pair, commonest_scale, found_of, pairs_of, uniform
from lorica.files.peft_layout import modules_of
from lorica.files.peft_written import exact_names
from lorica.files.safetensors_file import TensorFile, write_tensors
from lorica.methods.bottleneck import Bottleneck
from lorica.methods.method import Tensors
from lorica.methods.placed import whole
from lorica.records.atomic import write_file

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
_HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
_LAYER = re.compile(r"(?:\w+\.)?encoder\.layer\.(\d+)\.(.+)")
_ROLES = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "intermediate.dense": "intermediate_lora",
    "output.dense": "output_lora",
}
_HALVES = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
}
_KEY = re.compile(r"(.+)\.(loras|adapters)\.([^.]+)\.(.+)")
_NON_LINEARITIES = {"relu": "relu", "gelu": "gelu", "swish": "silu", "tanh": "tanh"}
_LORA = {
    "architecture": "lora",
    "composition_mode": "add",
    "dropout": 0.0,
    "dtype": None,
    "init_weights": "lora",
    "init_weights_seed": None,
    "use_dora": False,
    "use_gating": False,
    "vera_b": None,
    "vera_d": None,
}
_BOTTLENECK = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "bert",
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "ln_after": False,
    "ln_before": False,
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "residual_before_ln": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
_FREE = ("dropout", "init_weights", "init_weights_seed", "dtype", "vera_b", "vera_d")
"""Settings that say nothing of a trained adapter, or nothing for these kinds."""
_SHOWN = 10


def claims(path: Path) -> bool:
    """Whether a folder is AdapterHub's."""
    if not (path / CONFIG).is_file():
        return False
    return (path / WEIGHTS).is_file() or (path / PICKLE).is_file()


# --- writing --------------------------------------------------------------------------------------


def write(adapter: Adapter, path: Path, dtype: str, overwrite: bool) -> list[str]:
    """Write the folder; returns what the user should be told.

    Raises:
        AdapterFileError: the model has other names, the method no place, or its layers no setting.
    """
    if isinstance(adapter.method, Bottleneck):
        config, tensors = _bottleneck(adapter)
        notes = []
    else:
        config, tensors, notes = _lora(adapter)
    model: Any = adapter.model
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    facts = {
        "config": dict(sorted(config.items())),
        "hidden_size": size,
        "model_class": type(model).__name__,
        "model_name": adapter.base.get("name") or "",
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "name": adapter.name,
        "version": "adapters.1.3.0",
    }
    cast = {key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors.items()}
    with new_folder(path, marker=CONFIG, overwrite=overwrite, error=AdapterFileError) as temporary:
        write_tensors(temporary / WEIGHTS, cast)
        write_file(temporary / CONFIG, json.dumps(facts, indent=2, sort_keys=True) + "\n")
    load = f"model.load_adapter({str(path)!r}, use_safetensors=True)"
    return [*notes, f"read it by {load}"]


def _lora(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    pairs = pairs_of(adapter, "AdapterHub's layout")
    roles, left_out = _roles(adapter.model, pairs, _ROLES)
    scale, r = commonest_scale(pairs), max(pair.r for pair in pairs.values())
    tensors = {}
    for path, pair in uniform(pairs, scale, r).items():
        tensors[f"{path}.loras.{adapter.name}.lora_A"] = pair.A
        tensors[f"{path}.loras.{adapter.name}.lora_B"] = pair.B
    matrices = [role for role in ("q", "k", "v") if role in roles]
    config = {
        **_LORA,
        "r": r,
        "alpha": whole(scale * r),
        "attn_matrices": matrices,
        "selfattn_lora": bool(matrices),
        "intermediate_lora": "intermediate_lora" in roles,
        "output_lora": "output_lora" in roles,
        "leave_out": left_out,
    }
    padded = sum(pair.r != r or pair.scale != scale for pair in pairs.values())
    notes = [f"one rank and scale: {padded} layers were filled up or rescaled"] if padded else []
    return config, tensors, notes


def _bottleneck(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    method: Any = adapter.method
    others = [
        f"{path}: {slot.method.kind}"
        for path, slot in adapter.slots.items()
        if type(slot.method) is not Bottleneck
    ]
    others += [f"it lies on {adapter.on.method.kind}"] if adapter.on is not None else []
    others += ["the parallel layout is not written"] if method.layout == "parallel" else []
    if others:
        raise AdapterFileError("AdapterHub cannot hold this adapter", problems=others[:_SHOWN])
    places = {"attention.output.dense": "mh_adapter", "output.dense": "output_adapter"}
    roles, left_out = _roles(adapter.model, adapter.slots, places)
    if "output_adapter" not in roles:
        raise AdapterFileError("AdapterHub has no bottleneck behind attention alone")
    tensors = {}
    first = next(iter(adapter.slots.values())).tensors
    for path, slot in adapter.slots.items():
        head = f"{path.removesuffix('.dense')}.adapters.{adapter.name}"
        for theirs, ours in _HALVES.items():
            tensors[f"{head}.{theirs}"] = slot.tensors[ours].detach().cpu()
    spelled = {ours: theirs for theirs, ours in _NON_LINEARITIES.items()}
    narrow, width = first["down"].shape
    config = {
        **_BOTTLENECK,
        "mh_adapter": "mh_adapter" in roles,
        "non_linearity": spelled[method.non_linearity],
        "reduction_factor": whole(width / narrow),
        "scaling": float(method.adapter_scaling),
        "leave_out": left_out,
    }
    return config, tensors


def _roles(
    model: nn.Module, paths: Iterable[str], known: dict[str, str]
) -> tuple[set[str], list[int]]:
    """What is adapted in every layer, and the layers in which nothing is.

    Raises:
        AdapterFileError: a layer is named otherwise, or layers differ in what is adapted.
    """
    found: dict[int, set[str]] = {}
    problems = []
    for path in paths:
        match = _LAYER.fullmatch(path)
        if match is None or match[2] not in known:
            problems.append(f"{path}: AdapterHub has no setting for it")
        else:
            found.setdefault(int(match[1]), set()).add(known[match[2]])
    kinds = {frozenset(roles) for roles in found.values()}
    if len(kinds) > 1:
        problems.append("layers differ in what is adapted; AdapterHub leaves whole layers out only")
    if problems:
        raise AdapterFileError("AdapterHub cannot hold this adapter", problems=problems[:_SHOWN])
    every = {int(match[1]) for path in modules_of(model) if (match := _LAYER.match(path))}
    return set(next(iter(kinds))), sorted(every - found.keys())


# --- reading --------------------------------------------------------------------------------------


def read(model: nn.Module, path: Path) -> Found:
    """The adapter in a folder, for `model`.

    Raises:
        AdapterFileError: a pickle, a method or setting that is not read, layers that the model
            lacks, or shapes that are not those of the model.
    """
    if not (path / WEIGHTS).is_file():
        raise AdapterFileError(
            f"{path / PICKLE} is a pickle, which can run code when read; none is loaded",
            expected=WEIGHTS,
            mend="write it again where you trust it: model.save_adapter(folder, name, "
            "use_safetensors=True)",
        )
    if beside := [name for name in _HEADS if (path / name).exists()]:
        warnings.warn(
            f"{path / beside[0]} is a head, which is not read: the adapter alone is",
            LoricaWarning,
            stacklevel=4,
        )
    config = read_json(path / CONFIG).get("config")
    if not isinstance(config, dict):
        raise AdapterFileError(f"{path / CONFIG} has no config", expected="AdapterHub's settings")
    held: dict[str, dict[str, Tensor]] = {}
    problems = []
    with TensorFile(path / WEIGHTS) as file:
        for key in file.entries:
            match = _KEY.fullmatch(key)
            if match is None:
                problems.append(f"{key}: of a method that is not read")
            else:
                held.setdefault(match[1], {})[match[4]] = file.read(key)
    if problems or not held:
        raise AdapterFileError(
            f"{path} cannot be read", problems=problems[:_SHOWN] or ["it holds no tensors"]
        )
    if config.get("architecture") == "lora":
        return _read_lora(model, path, config, held)
    return _read_bottleneck(model, path, config, held)


def _check(path: Path, config: dict[str, Any], known: dict[str, Any]) -> None:
    """Raises AdapterFileError for settings under which an adapter computes something else."""
    problems = [
        f"{key} is {str(config[key])[:40]}; only {value} is read"
        for key, value in known.items()
        if key in config
        and key not in _FREE
        and config[key] != value
        and not key.startswith("phm_")
    ]
    if config.get("phm_layer"):
        problems.append("phm_layer: Compacter is not read")
    if problems:
        raise AdapterFileError(f"{path / CONFIG} cannot be used", problems=problems[:_SHOWN])


def _read_lora(
    model: nn.Module, path: Path, config: dict[str, Any], held: dict[str, dict[str, Tensor]]
) -> Found:
    _check(path, config, _LORA)
    r, alpha = config.get("r"), config.get("alpha")
    if type(r) is not int or r < 1 or not isinstance(alpha, int | float) or not 0 < alpha < 1e4:
        raise AdapterFileError(f"{path / CONFIG}: r is {r}, alpha is {alpha}")
    if lacking := [name for name, own in held.items() if own.keys() != {"lora_A", "lora_B"}]:
        raise AdapterFileError(f"{path}: not a pair of factors", problems=lacking[:_SHOWN])
    pairs = {name: Pair(own["lora_A"], own["lora_B"], float(alpha)) for name, own in held.items()}
    return found_of(model, pairs, path)


def _read_bottleneck(
    model: nn.Module, path: Path, config: dict[str, Any], held: dict[str, dict[str, Tensor]]
) -> Found:
    _check(path, config, _BOTTLENECK)
    scaling, shape = config.get("scaling", 1.0), str(config.get("non_linearity")).lower()
    problems = []
    if not isinstance(scaling, int | float):
        problems.append(f"scaling is {str(scaling)[:40]}; only a number is read")
    if shape not in _NON_LINEARITIES:
        problems.append(f"non_linearity is {shape[:40]}; there are {', '.join(_NON_LINEARITIES)}")
    modules, tensors = modules_of(model), dict[str, Tensors]()
    for parent, own in held.items():
        layer = modules.get(f"{parent}.dense")
        own = {_HALVES.get(key, key): tensor.float() for key, tensor in own.items()}
        if not isinstance(layer, nn.Linear) or own.keys() != set(_HALVES.values()):
            problems.append(f"{parent}: no bottleneck behind a layer of this model")
            continue
        narrow, width = own["down_bias"].numel(), layer.out_features
        wanted = {
            "down": (narrow, width),
            "down_bias": (narrow,),
            "up": (width, narrow),
            "up_bias": (width,),
        }
        wrong = [key for key, size in wanted.items() if tuple(own[key].shape) != size]
        problems += [
            f"{parent}: {key} is {tuple(own[key].shape)}, not {wanted[key]}" for key in wrong
        ]
        tensors[f"{parent}.dense"] = own
    widths = {own["down_bias"].numel() for own in tensors.values()}
    problems += ["the bottlenecks differ in width"] if len(widths) > 1 else []
    if problems or not widths:
        raise AdapterFileError(
            f"{path} does not fit this {type(model).__name__}", problems=problems[:_SHOWN]
        )
    method = Bottleneck(
        target_modules=tuple(exact_names(tensors, modules)[0]),
        layout="houlsby" if config.get("mh_adapter") else "pfeiffer",
        reduction_factor=modules[next(iter(tensors))].out_features / widths.pop(),  # type: ignore[operator]
        non_linearity=_NON_LINEARITIES[shape],  # type: ignore[arg-type]
        adapter_scaling=float(scaling),
    )
    order = {name: i for i, name in enumerate(modules)}
    ordered = sorted(tensors, key=order.__getitem__)
    places: Places = {name: (modules[name], None, method) for name in ordered}
    return Found(method, places, {name: tensors[name] for name in ordered})
