"""Adapters of mlx-lm: adapters.safetensors and adapter_config.json in a folder.

    model.layers.0.self_attn.q_proj.lora_a (I, R)     .lora_b (R, O)     .m (O,) of DoRA

Both factors are the transposes of everyone else's. One rank and one scale hold for all layers, and
`keys` names what is adapted inside every one of the last `num_layers` layers. Missing ranks are
written as zeros, and the rest of a scale goes into lora_b. A layer that keys name and that has no
factors starts as none, which is the identity.

Legend: I in features, O out features, R rank.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.handle import Adapter
from lorica.errors import AdapterFileError
from lorica.files.folder import new_folder, read_json
from lorica.files.found import Found
from lorica.files.pairs import Pair, commonest_scale, found_of, pairs_of, uniform
from lorica.files.peft_layout import modules_of
from lorica.files.safetensors_file import TensorFile, write_tensors
from lorica.records.atomic import write_file

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_PARTS = {"lora_a": "A", "lora_b": "B", "m": "m"}
_SHOWN = 10


def claims(path: Path) -> bool:
    """Whether a folder is mlx-lm's."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def write(adapter: Adapter, path: Path, dtype: str, overwrite: bool) -> list[str]:
    """Write the folder; returns what the user should be told.

    Raises:
        AdapterFileError: mlx-lm has no such layers, or no place for the method.
    """
    model = adapter.model
    pairs = pairs_of(adapter, "mlx-lm", kinds=("linear", "embedding"), dora=True)
    keys, problems = set[str](), []
    for layer in pairs:
        found = _LAYER.fullmatch(layer)
        if found is None and layer not in ("lm_head", "model.embed_tokens"):
            problems.append(f"{layer}: mlx-lm names layers model.layers.N.NAME")
        keys.add(found[2] if found else layer)
    if len({pair.m is None for pair in pairs.values()}) > 1:
        problems.append("DoRA at some layers only")
    if problems:
        raise AdapterFileError("mlx-lm cannot hold this adapter", problems=problems[:_SHOWN])
    scale, r = commonest_scale(pairs), max(pair.r for pair in pairs.values())
    tensors: dict[str, Tensor] = {}
    for layer, pair in uniform(pairs, scale, r).items():
        tensors[f"{layer}.lora_a"] = pair.A.t()
        tensors[f"{layer}.lora_b"] = pair.B.t()
        if pair.m is not None:
            tensors[f"{layer}.m"] = pair.m
    dora = any(pair.m is not None for pair in pairs.values())
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "model": adapter.base.get("name"),
        "num_layers": _num_layers(model),
        "lora_parameters": {"rank": r, "scale": scale, "dropout": 0.0, "keys": sorted(keys)},
    }
    cast = {key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors.items()}
    with new_folder(path, marker=CONFIG, overwrite=overwrite, error=AdapterFileError) as temporary:
        write_tensors(temporary / WEIGHTS, cast)
        write_file(temporary / CONFIG, json.dumps(config, indent=4, sort_keys=True) + "\n")
    padded = sum(pair.r != r for pair in pairs.values())
    return [f"mlx-lm has one rank: {padded} layers were filled with zeros to {r}"] if padded else []


def _num_layers(model: nn.Module) -> int:
    numbers = [int(found[1]) for path in modules_of(model) if (found := _LAYER.match(path))]
    return max(numbers, default=-1) + 1


def read(model: nn.Module, path: Path) -> Found:
    """The adapter in a folder, for `model`.

    Raises:
        AdapterFileError: a whole fine-tune, no scale, layers that the model lacks, halves without
            their other half, or shapes that are not those of the model.
    """
    config = read_json(path / CONFIG)
    scale = _scale(config, path / CONFIG)
    layers: dict[str, dict[str, Tensor]] = {}
    problems = []
    with TensorFile(path / WEIGHTS) as file:
        for key in file.entries:
            layer, _, part = key.rpartition(".")
            if part not in _PARTS:
                problems.append(f"{key}: no factor of LoRA")
            else:
                layers.setdefault(layer, {})[_PARTS[part]] = file.read(key)
    for layer, own in layers.items():
        if not {"A", "B"} <= own.keys():
            problems.append(f"{layer}: lora_a or lora_b is missing")
        elif own["A"].dim() != 2 or own["B"].dim() != 2:
            problems.append(f"{layer}: factors of {own['A'].dim()} dimensions")
    if problems:
        raise AdapterFileError(
            f"{path} does not fit this {type(model).__name__}", problems=problems[:_SHOWN]
        )
    pairs = {
        layer: Pair(own["A"].t(), own["B"].t(), scale * own["A"].shape[1], own.get("m"))
        for layer, own in layers.items()
    }
    name = config.get("model")
    return found_of(model, pairs, path, base_name=name if isinstance(name, str) else None)


def _scale(config: dict[str, Any], where: Path) -> float:
    """The scale of all layers. Raises AdapterFileError where the config does not say it."""
    kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise AdapterFileError(
            f"{where}: fine_tune_type is {str(kind)[:40]!r}", expected="lora or dora"
        )
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e4:
        raise AdapterFileError(
            f"{where}: lora_parameters.scale is {str(scale)[:40]}",
            expected="a number above 0: without it the strength of the adapter is not known",
        )
    return float(scale)
