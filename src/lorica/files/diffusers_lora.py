"""LoRA as diffusers keeps it: pytorch_lora_weights.safetensors, alone or in a folder.

    unet.PATH.lora_A.weight (R, I)    unet.PATH.lora_B.weight (O, R)    .lora_magnitude_vector (O,)
    likewise transformer.PATH, text_encoder.PATH ...

Ranks and scales stand in the metadata as one JSON object, lora_adapter_metadata, whose keys are
those of PEFT's LoraConfig behind the part's name: "unet.r", "unet.alpha_pattern" ... Files without
it have NAME.alpha beside the factors, or the scale 1.

Legend: I in features, O out features, R rank.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.handle import Adapter
from lorica.errors import AdapterFileError
from lorica.files.folder import new_file, parse_json
from lorica.files.found import Found
from lorica.files.image_names import by_diffusers_name, diffusers_names, parts_of
from lorica.files.pairs import Pair, found_of, pairs_of
from lorica.files.safetensors_file import TensorFile, write_tensors
from lorica.methods.patterns import pattern_value

FILE, NOTED = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
    ".alpha": "alpha",
}
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")
_PARTS = ("unet.", "transformer.", "transformer_2.", "text_encoder", "diffusion_model.")
_SHOWN = 10


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def claims(path: Path) -> bool:
    """Whether a file, or the file of a folder, has diffusers' keys."""
    file = _file(path)
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    with TensorFile(file) as held:
        return any(key.startswith(_PARTS) and _split(key)[1] for key in held.entries)


def write(adapter: Adapter, path: Path, dtype: str, overwrite: bool) -> list[str]:
    """Write the file; into a folder of that name where `path` has no suffix.

    Raises:
        AdapterFileError: the model is no part of a pipeline, or the method has no place.
    """
    names = diffusers_names(adapter.model)
    if not names:
        raise AdapterFileError(
            f"diffusers' files are for parts of its pipelines; this is a "
            f"{type(adapter.model).__name__}",
            mend="write --format peft or gguf",
        )
    pairs = pairs_of(adapter, "diffusers' layout", kinds=("linear", "conv2d"), dora=True)
    tensors: dict[str, Tensor] = {}
    for layer, pair in pairs.items():
        tensors[f"{names[layer]}.lora_A.weight"] = pair.A
        tensors[f"{names[layer]}.lora_B.weight"] = pair.B
        if pair.m is not None:
            shape = (1, -1, 1, 1) if pair.A.dim() == 4 else (-1,)
            tensors[f"{names[layer]}.lora_magnitude_vector"] = pair.m.reshape(shape)
    cast = {key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors.items()}
    target = path if path.suffix == ".safetensors" else path / FILE
    noted = json.dumps(_noted(adapter.model, pairs, names), indent=2, sort_keys=True)
    with new_file(target, overwrite=overwrite) as temporary:
        write_tensors(temporary, cast, {NOTED: noted})
    return []


def _noted(model: nn.Module, pairs: Mapping[str, Pair], names: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings of every part that has factors."""
    found: dict[str, Any] = {}
    for part, (start, module) in parts_of(model).items():
        own = {
            path.removeprefix(start): pair
            for path, pair in pairs.items()
            if names[path].startswith(f"{part}.")
        }
        if not own:
            continue
        inner = {layer: names[f"{start}{layer}"].removeprefix(f"{part}.") for layer in own}
        if not hasattr(module, "text_model"):  # as diffusers reads it, and the module is now
            inner = {layer: name.removeprefix("text_model.") for layer, name in inner.items()}
        ranks = {inner[layer]: pair.r for layer, pair in own.items()}
        alphas = {inner[layer]: pair.alpha for layer, pair in own.items()}
        r, alpha = (Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
        settings = {
            "r": r,
            "lora_alpha": alpha,
            "target_modules": sorted(inner.values()),
            "rank_pattern": {f"^{re.escape(n)}$": v for n, v in ranks.items() if v != r},
            "alpha_pattern": {f"^{re.escape(n)}$": v for n, v in alphas.items() if v != alpha},
            "use_dora": any(pair.m is not None for pair in own.values()),
        }
        found |= {f"{part}.{key}": value for key, value in settings.items()}
    return found


def read(model: nn.Module, path: Path) -> Found:
    """The adapter in a file or folder, for `model`.

    Raises:
        AdapterFileError: layers that the model lacks, halves without their other half, shapes that
            are not those of the model, or settings that change the arithmetic in other ways.
    """
    file, by_name = _file(path), by_diffusers_name(model)
    if not by_name:
        raise AdapterFileError(
            f"{path} is for a text-to-image pipeline, and this is a {type(model).__name__}",
            mend="load the pipeline: lorica.base.image_pipeline.ImagePipeline(pipeline)",
        )
    layers: dict[str, dict[str, Tensor]] = {}
    name_of: dict[str, str] = {}
    problems = []
    with TensorFile(file) as held:
        noted = _settings(held.metadata, file)
        for key in held.entries:
            name, part = _split(key)
            name = name.replace("diffusion_model.", "transformer.", 1)
            layer = by_name.get(name)
            if layer is None or not part:
                problems.append(
                    f"{key}: the model has no such layer" if part else f"{key}: no factor"
                )
            elif part in layers.setdefault(layer, {}):
                problems.append(f"{key}: the same layer under two names")
            else:
                layers[layer][part], name_of[layer] = held.read(key), name
    problems += [
        f"{layer}: a factor is missing"
        for layer, own in layers.items()
        if not {"A", "B"} <= own.keys()
    ]
    if problems:
        raise AdapterFileError(
            f"{file} does not fit this {type(model).__name__}",
            problems=problems[:_SHOWN],
            mend="load the pipeline that the adapter was made for",
        )
    pairs = {}
    for layer, own in layers.items():
        alpha = _alpha(noted, name_of[layer], own)
        m = own.get("m")
        pairs[layer] = Pair(own["A"], own["B"], alpha, None if m is None else m.reshape(-1))
    return found_of(model, pairs, file)


def _split(key: str) -> tuple[str, str]:
    """Name of the layer, and which part of it a key is; an empty part for none."""
    if found := _PROCESSOR.search(key):
        layer, side = found.groups()
        layer = "to_out.0" if layer == "to_out" else layer
        return f"{key[: found.start()]}.{layer}", "A" if side == "down" else "B"
    suffix = next((s for s in sorted(_SUFFIXES, key=len, reverse=True) if key.endswith(s)), None)
    return (key.removesuffix(suffix), _SUFFIXES[suffix]) if suffix else (key, "")


def _settings(metadata: Mapping[str, str], file: Path) -> dict[str, dict[str, Any]]:
    """PEFT's settings by part, where the file has them.

    Raises:
        AdapterFileError: they are no sound JSON, or say something that is not read.
    """
    if NOTED not in metadata:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for key, value in parse_json(metadata[NOTED].encode(), f"{NOTED} of {file}").items():
        part, _, setting = key.partition(".")
        found.setdefault(part, {})[setting] = value
    refused = ("lora_bias", "use_rslora", "bias", "alora_invocation_tokens", "layer_replication")
    problems = [
        f"{part}: {key} is {str(settings[key])[:40]}"
        for part, settings in found.items()
        for key in refused
        if settings.get(key) not in (None, False, "none") and key != "use_rslora"
    ]
    if problems:
        raise AdapterFileError(f"{file} has settings that are not read", problems=problems)
    return found


def _alpha(noted: Mapping[str, dict[str, Any]], name: str, own: Mapping[str, Tensor]) -> float:
    """Scale times rank of one layer."""
    r = own["A"].shape[0] if own["A"].dim() else 1
    part, _, layer = name.partition(".")
    if "alpha" in own:
        return float(own["alpha"])
    settings = noted.get(part)
    if settings is None:
        return float(r)
    patterns = settings.get("alpha_pattern") or {}
    layer = layer.removeprefix("text_model.")
    plain = {
        key.removeprefix("^").removesuffix("$").replace("\\.", "."): v
        for key, v in patterns.items()
    }
    alpha = pattern_value(plain, layer)
    alpha = float(settings.get("lora_alpha", r) if alpha is None else alpha)
    return alpha * r**0.5 if settings.get("use_rslora") else alpha
