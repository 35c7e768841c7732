"""LoRA for llama.cpp: one GGUF file that it loads beside a base in GGUF.

    general.type "adapter", adapter.type "lora", adapter.lora.alpha
    blk.0.attn_q.weight.lora_a (R, I)      blk.0.attn_q.weight.lora_b (O, R)
    token_embd.weight.lora_a (V, R)        token_embd.weight.lora_b (O, R)

llama.cpp scales every product by alpha / R with the one alpha of the file. Where layers have other
scales, the rest goes into lora_b.

Legend: I in features, O out features, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.handle import Adapter
from lorica.errors import AdapterFileError
from lorica.files.folder import new_file
from lorica.files.found import Found
from lorica.files.gguf_file import is_gguf, read_gguf
from lorica.files.gguf_names import (
    architecture_of,
    heads_of,
    names_of,
    package,
    to_halves,
    to_pairs,
)
from lorica.files.pairs import Pair, found_of, pairs_of
from lorica.files.peft_layout import modules_of

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
_SHOWN = 10
_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16"}


def claims(path: Path) -> bool:
    """Whether a file is GGUF; which kind of one, `read` says."""
    return is_gguf(path)


def write(adapter: Adapter, path: Path, dtype: str, overwrite: bool) -> list[str]:
    """Write the file; returns what the user should be told.

    Raises:
        AdapterFileError: llama.cpp has no such model or weight, or no place for the method.
    """
    gguf, model = package(), adapter.model
    arch = architecture_of(model)
    pairs = pairs_of(adapter, "a LoRA of llama.cpp", kinds=("linear", "embedding"))
    names = names_of(model, [f"{layer}.weight" for layer in pairs])
    _check_names(model, pairs, names)
    alpha = _alpha(pairs)
    with new_file(path, overwrite=overwrite) as temporary:
        writer = gguf.GGUFWriter(temporary, arch.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for layer, pair in pairs.items():
            name = names[f"{layer}.weight"]
            for part, tensor in _to_file(model, name, pair, alpha).items():
                numbers = tensor.to(getattr(torch, dtype)).contiguous().numpy()
                writer.add_tensor(f"{name}.{part}", numbers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    moved = [layer for layer, pair in pairs.items() if pair.alpha != alpha]
    if not moved:
        return []
    return [
        f"the file has one lora_alpha, {alpha:g}; that of {len(moved)} layers differs, and the rest"
        " of their scale went into lora_b"
    ]


def _alpha(pairs: Mapping[str, Pair]) -> float:
    """The alpha that most layers have, as the 32 bits of the file hold it."""
    alphas = [pair.alpha for pair in pairs.values()]
    return float(torch.tensor(max(set(alphas), key=alphas.count), dtype=torch.float32))


def _to_file(model: nn.Module, name: str, pair: Pair, alpha: float) -> dict[str, Tensor]:
    """The two tensors of a layer, in llama.cpp's order of rows."""
    A, B = pair.A, pair.with_alpha(alpha).B
    if heads := heads_of(model, name):
        B = to_pairs(B, heads)
    return {"lora_a": A.t() if name == EMBEDDING else A, "lora_b": B}


def _check_names(model: nn.Module, pairs: Mapping[str, Pair], names: Mapping[str, str]) -> None:
    """Every layer needs a weight in llama.cpp that is its own there."""
    problems = [f"{p}: llama.cpp has no such weight" for p in pairs if f"{p}.weight" not in names]
    tied = bool(getattr(model, "config", None) and model.config.tie_word_embeddings)  # type: ignore
    for path in pairs:
        name = names.get(f"{path}.weight")
        if name == EMBEDDING and tied:
            problems.append(
                f"{path}: the output layer shares its weight, and llama.cpp would use the factors "
                "there as well"
            )
        if name == OUTPUT and (tied or not architecture_of(model).has_output):
            problems.append(f"{path}: llama.cpp has no output matrix apart from the embedding here")
    if problems:
        raise AdapterFileError(
            "llama.cpp cannot hold this adapter",
            problems=problems[:_SHOWN],
            mend="merge it and export that: --format gguf-model",
        )


def read(model: nn.Module, path: Path) -> Found:
    """The adapter in a file, for `model`.

    Raises:
        AdapterFileError: a whole model, another kind of adapter, another architecture, factors
            without their other half, or shapes that are not those of the model.
    """
    held = read_gguf(path)
    arch = architecture_of(model)
    _check_fields(held.fields, arch.name, path)
    layers = names_of(model, [f"{layer}.weight" for layer in modules_of(model) if layer])
    of_name = {name: layer.removesuffix(".weight") for layer, name in layers.items()}
    halves: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in held.tensors.items():
        name, _, part = key.rpartition(".")
        if part not in ("lora_a", "lora_b"):
            problems.append(f"{key}: no factor of LoRA")
        elif name not in of_name:
            problems.append(f"{key}: {type(model).__name__} has no such weight")
        elif tensor.dim() != 2:
            problems.append(f"{key}: {tuple(tensor.shape)}, where two dimensions are needed")
        else:
            halves.setdefault(name, {})[part] = tensor
    problems += [
        f"{name}: {next(iter(found))} alone" for name, found in halves.items() if len(found) < 2
    ]
    if problems:
        raise AdapterFileError(
            f"{path} does not fit this {type(model).__name__}", problems=problems[:_SHOWN]
        )
    alpha = float(held.fields["adapter.lora.alpha"])
    pairs = {of_name[n]: _from_file(model, n, found, alpha) for n, found in halves.items()}
    return found_of(model, pairs, path)


def _check_fields(fields: Mapping[str, Any], arch: str, path: Path) -> None:
    kind, method = fields.get("general.type"), fields.get("adapter.type")
    if kind != "adapter":
        raise AdapterFileError(
            f"{path} is a GGUF file of a {str(kind or 'model')[:20]}, not of an adapter",
            mend="give the file that holds the LoRA alone; a base is loaded from its own folder",
        )
    if method != "lora":
        raise AdapterFileError(f"{path}: an adapter of type {str(method)[:40]!r}", expected="lora")
    if fields.get("general.architecture") != arch:
        raise AdapterFileError(
            f"{path} is for a base of {str(fields.get('general.architecture'))[:40]}",
            expected=f"one of {arch}, as this model is",
            mend="load the base that the adapter was made for",
        )
    alpha = fields.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not 0 < alpha < 1e6:
        raise AdapterFileError(
            f"{path}: adapter.lora.alpha is {str(alpha)[:20]}",
            expected="a number above 0: without it the strength of the adapter is not known",
            mend="write the file again with a newer converter",
        )
    if "adapter.alora.invocation_tokens" in fields:
        raise AdapterFileError(f"{path} acts behind certain tokens only (aLoRA), which is not read")


def _from_file(model: nn.Module, name: str, found: Mapping[str, Tensor], alpha: float) -> Pair:
    A, B = found["lora_a"], found["lora_b"]
    if name == EMBEDDING:
        A = A.t().contiguous()
    heads = heads_of(model, name)
    if heads and B.shape[0] % (2 * heads) == 0:  # otherwise `found_of` tells the shapes
        B = to_halves(B, heads)
    return Pair(A, B, alpha)
