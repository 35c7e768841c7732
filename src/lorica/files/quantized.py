"""A quantized base as a folder: Lorica, or transformers with bitsandbytes, loads it in seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lorica.attach.handle import adapters
from lorica.base.four_bit import FourBit
from lorica.base.known import base_of
from lorica.base.quantize import quantized_layers
from lorica.base.quantizer import Quantizer
from lorica.errors import BaseModelError
from lorica.files.folder import new_folder

WEIGHTS = "model.safetensors"


def save_base(
    model: nn.Module,
    folder: str | Path,
    *,
    facts: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a quantized model of transformers, with its config and its tokenizer.

    Args:
        folder: appears whole or not at all.
        facts: how the model must be asked, for lorica.json.
        overwrite: replace a model that is there.

    Raises:
        BaseModelError: no layer is quantized, or several quantizers were used; adapters are
            attached; the model is none of transformers; the folder exists.
    """
    if left := adapters(model):
        raise BaseModelError(
            f"adapters are attached ({', '.join(left)}); a saved base would lack them",
            mend="detach them first: they have folders of their own",
        )
    layers = dict(quantized_layers(model))
    kinds = {module.quantizer for module in layers.values()}
    config: Any = getattr(model, "config", None)
    if len(kinds) != 1 or not hasattr(config, "to_dict"):
        raise BaseModelError(
            f"{type(model).__name__} is no model of transformers with one quantizer",
            expected='what lorica.load_model(..., quantize="nf4") gives',
            mend="lorica.files.whole.save_merged writes plain models",
        )
    state = {key: tensor.detach().contiguous() for key, tensor in _state(model).items()}
    values = config.to_dict()
    skipped = [
        path for path, m in model.named_modules() if type(m) is nn.Linear and path not in layers
    ]
    values["quantization_config"] = _words(kinds.pop(), skipped, model)
    with new_folder(
        folder, marker="config.json", overwrite=overwrite, error=BaseModelError
    ) as temporary:
        text = json.dumps(values, indent=2, sort_keys=True, default=str) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(temporary)  # type: ignore[union-attr]
        base = base_of(model)
        if base is not None and base.tokenizer is not None:
            base.tokenizer.save_pretrained(temporary)
        if facts is not None:
            text = json.dumps(dict(facts), indent=2, sort_keys=True) + "\n"
            (temporary / "lorica.json").write_text(text, encoding="utf-8")
        save_file(state, str(temporary / WEIGHTS), metadata={"format": "pt"})
    return Path(folder)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without second names of tied tensors."""
    found, seen = {}, set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        own = tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
        if isinstance(tensor, nn.Parameter) and tensor.numel() and own in seen:
            continue
        seen.add(own)
        found[key] = tensor
    return found


def _words(kind: Quantizer, skipped: list[str], model: nn.Module) -> dict[str, Any]:
    """The quantization_config that transformers writes for the same layers."""
    common = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": skipped}
    if not isinstance(kind, FourBit):
        return {**common, "load_in_8bit": True, "load_in_4bit": False}
    dtype = next(module.stored_dtype for _, module in quantized_layers(model))
    return {
        **common,
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind.word,
        "bnb_4bit_use_double_quant": kind.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }
