"""Bases that lie quantized on the disk: read here, read by transformers, or refused.

Folders in the format of bitsandbytes, such as `files.quantized` writes them, are read without that
library, into layers of Lorica's own. For others transformers has a reader that needs the library
they were made with.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorica.base.quantize import recognise
from lorica.base.quantized import quantized
from lorica.base.quantizer import Quantizer
from lorica.errors import BaseModelError

OWN = "bitsandbytes"
"""The quant_method whose folders are read here."""

_NEEDS = {
    "torchao": ("torchao",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel",),
    "hqq": ("hqq",),
}
"""quant_method -> the packages without which transformers cannot read it."""

_TRIED = ("torchao",)
"""Those that are known to carry adapters."""


def method_of(config: Any) -> str | None:
    """The quant_method that a config names; None where the model is plain."""
    found = config.get("quantization_config") if isinstance(config, Mapping) else None
    if found is None:
        found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    word = found.get("quant_method") if isinstance(found, Mapping) else found.quant_method
    if word is None and isinstance(found, Mapping) and any("load_in_" in key for key in found):
        return OWN  # older files of bitsandbytes do not name it
    return str(getattr(word, "value", word))


def stored_problems(word: str) -> list[str]:
    """Why a base that lies quantized in this way cannot be loaded; empty where it can."""
    if word == OWN:
        return []
    mend = "name the base in full precision, and quantize it on the way in: quantize: nf4"
    if missing := [name for name in _NEEDS.get(word, ()) if find_spec(name) is None]:
        lacks = f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not installed"
        return [f"it is quantized ({word}), and {lacks}; {mend}"]
    if word not in _TRIED:
        return [f"it is quantized ({word}), which is not supported; {mend}"]
    return []


def read_stored(files: list[Path]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The tensors of a folder in the format of bitsandbytes: plain ones by name, and those of
    quantized layers by path and name. They are mapped from the files, not read yet.
    """
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            found |= {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    paths = {key.partition(".weight.quant_state.")[0] for key in found if ".quant_state." in key}
    paths |= {key.removesuffix(".SCB") for key in found if key.endswith(".SCB")}
    plain, layers = {}, {path: dict[str, Tensor]() for path in paths}
    for key, tensor in found.items():
        path = next((p for p in _above(key) if p in layers), None)
        name = key if path is None else key.removeprefix(f"{path}.")
        if path is None or name == "bias":
            plain[key] = tensor
        else:
            layers[path][name] = tensor
    return plain, layers


def _above(key: str) -> list[str]:
    """The paths that a name may lie below."""
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def quantizers_of(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Quantizer]:
    """The quantizer of every layer. Raises BaseModelError where one is not known."""
    found = {path: recognise(entries) for path, entries in layers.items()}
    if strange := [path for path, kind in found.items() if kind is None]:
        raise BaseModelError(
            "quantized weights that are neither nf4, fp4 nor int8", problems=strange[:5]
        )
    return {path: kind for path, kind in found.items() if kind is not None}


def fill(
    model: nn.Module,
    layers: Mapping[str, Mapping[str, Tensor]],
    kinds: Mapping[str, Quantizer],
    dtype: torch.dtype,
) -> None:
    """Give a model its quantized layers.

    Raises:
        BaseModelError: tensors that are cut off, of other sizes, or too many; all of them at once.
    """
    problems: list[str] = []
    ready = []
    for path, entries in layers.items():
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        shape = module.out_features, module.in_features
        try:
            stored = kinds[path].read(entries, shape)
        except BaseModelError as error:
            problems += [f"{path}: {text}" for text in error.problems]
            continue
        known = kinds[path].entries(stored, shape, dtype)
        if left := sorted(entries.keys() - known.keys()):
            problems.append(f"{path}: nobody reads {', '.join(left)}")
        ready.append((module, kinds[path], stored))
    if problems:
        raise BaseModelError("quantized weights cannot be read", problems=problems[:20])
    for module, kind, stored in ready:
        quantized(module, kind, {name: tensor.clone() for name, tensor in stored.items()}, dtype)
