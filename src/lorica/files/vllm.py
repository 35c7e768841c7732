"""A folder of PEFT's layout that vLLM serves: one rank, one scale, and names that it fuses right.

vLLM reads r, lora_alpha, use_rslora and target_modules of adapter_config.json and no patterns, so
an adapter with several ranks or scales would be served wrongly: ranks are filled with zeros here,
and the rest of a scale goes into B. What it does not serve at all is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from lorica.attach.handle import Adapter
from lorica.errors import AdapterFileError
from lorica.files.folder import new_folder
from lorica.files.pairs import commonest_scale, pairs_of, uniform
from lorica.files.peft_layout import PREFIX, modules_of
from lorica.files.peft_written import exact_names
from lorica.files.safetensors_file import write_tensors
from lorica.methods.placed import whole
from lorica.records.atomic import write_file

CONFIG, WEIGHTS, NOTES = "adapter_config.json", "adapter_model.safetensors", "vllm.txt"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank."""


def claims(path: Path) -> bool:
    """It is PEFT's layout, which is read as that."""
    return False


def write(adapter: Adapter, path: Path, dtype: str, overwrite: bool) -> list[str]:
    """Write the folder; returns what the user should be told, with the flags to serve it.

    Raises:
        AdapterFileError: vLLM serves no such method or layer, or no such rank.
    """
    pairs = pairs_of(adapter, "vLLM")
    outside = [layer for layer in pairs if layer.rpartition(".")[2] in ("lm_head", "score")]
    if outside:
        raise AdapterFileError(
            "vLLM does not adapt the output layer of most models any more",
            problems=outside,
            mend="merge the adapter into its base (lorica merge) and serve that",
        )
    r = max(pair.r for pair in pairs.values())
    limit = next((size for size in RANKS if size >= r), None)
    if limit is None:
        raise AdapterFileError(
            f"the rank is {r}; vLLM serves at most {RANKS[-1]}",
            mend="merge the adapter into its base (lorica merge) and serve that",
        )
    scale = commonest_scale(pairs)
    tensors: dict[str, Tensor] = {}
    for layer, pair in uniform(pairs, scale, r).items():
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = pair.A.to(getattr(torch, dtype))
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = pair.B.to(getattr(torch, dtype))
    names, excluded = exact_names(pairs, modules_of(adapter.model))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.get("name"),
        "r": r,
        "lora_alpha": whole(scale * r),
        "target_modules": names,
        "exclude_modules": excluded or None,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    base = adapter.base.get("name") or "BASE"
    flags = f"vllm serve {base} --enable-lora --max-lora-rank {limit} --lora-modules NAME={path}"
    with new_folder(path, marker=CONFIG, overwrite=overwrite, error=AdapterFileError) as temporary:
        write_tensors(temporary / WEIGHTS, tensors)
        write_file(temporary / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_file(temporary / NOTES, flags + "\n")
    padded = sum(pair.r != r for pair in pairs.values())
    scaled = sum(pair.scale != scale for pair in pairs.values())
    notes = [f"{padded} layers were filled with zeros to the rank {r}"] if padded else []
    notes += [f"the scale of {scaled} layers went into B"] if scaled else []
    return [*notes, flags]
