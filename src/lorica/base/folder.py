"""What is wrong with the folder of a base, told from names, sizes and headers alone.

The library that loads it would find most of this too, but late, one thing at a time, or not at all:
it follows an index out of the folder, and casts integers to floats without a word.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.models.auto import configuration_auto

from lorica.base.stored import method_of, stored_problems
from lorica.errors import nearest

KNOWN_KINDS = getattr(configuration_auto, "CONFIG_MAPPING_NAMES")  # noqa: B009 (not exported)
INDEX = "model.safetensors.index.json"
MOST_BYTES = {  # file -> bytes; the largest that are in use have a tenth of it
    "config.json": 4 * 2**20,
    "tokenizer_config.json": 32 * 2**20,
    "special_tokens_map.json": 4 * 2**20,
    "generation_config.json": 4 * 2**20,
    "added_tokens.json": 32 * 2**20,
    "chat_template.jinja": 4 * 2**20,
    "tokenizer.json": 256 * 2**20,
    "vocab.json": 256 * 2**20,
    "merges.txt": 256 * 2**20,
    "tokenizer.model": 256 * 2**20,
    INDEX: 256 * 2**20,
}
MOST_HEADER = 100 * 2**20
MOST = {  # what a config may ask for; beyond it, making the modules alone would take hours
    1_000: ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    1_000_000: ("hidden_size", "d_model", "n_embd", "intermediate_size", "d_ff"),
    10_000_000: ("vocab_size",),
}
_OTHER_NUMBERS = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "I8", "U8", "C64")
_SHARD = re.compile(r".*-\d+-of-\d+\.safetensors")
_SHOWN = 5


def folder_problems(
    folder: Path, *, trust_remote_code: bool = False, weights: bool = True
) -> list[str]:
    """Everything that keeps a folder from being a base, a sentence each; `weights` False: from
    being one of which only the config is read.
    """
    if not (folder / "config.json").exists():
        return [_no_config(folder)]
    if (folder / "adapter_config.json").is_file():  # transformers would put it on, unasked
        return [f"{folder} holds an adapter beside the model: move it into a folder of its own"]
    if problems := unfit_files(folder):
        return problems
    problems = list(_config_problems(folder, trust_remote_code))
    return problems + (_index_problems(folder) or _weight_problems(folder)) * weights


def _no_config(folder: Path) -> str:
    if folder.suffix == ".gguf" or any(folder.glob("*.gguf")):
        return f"{folder} is GGUF, which is not read: name the safetensors base it was made from"
    if folder.is_file():
        return f"{folder} is a file: name the folder with config.json and *.safetensors"
    if (folder / "model_index.json").is_file():
        return f"{folder} is a pipeline of diffusers: its task is text-to-image"
    if (folder / "adapter_config.json").is_file():
        return (
            f"{folder} is an adapter, not a base model: name the base, and load the adapter on it"
        )
    return f"{folder} has no config.json"


def unfit_files(folder: Path) -> list[str]:
    """Files that are too large, or that no one can read to the end: a FIFO, a device."""
    return list(_unfit_files(folder))


def _unfit_files(folder: Path) -> Iterator[str]:
    for path in (*(folder / name for name in MOST_BYTES), *folder.glob("*.safetensors")):
        try:
            found = path.stat()
        except FileNotFoundError:
            if path.is_symlink():
                yield f"{path} is a link to nothing: the download is not complete"
            continue
        except OSError as error:
            yield f"{path}: {error.strerror}"
            continue
        most = MOST_BYTES.get(path.name)
        if not stat.S_ISREG(found.st_mode):
            yield f"{path} is not a regular file"
        elif most and found.st_size > most:
            yield f"{path} has {found.st_size:,} bytes; at most {most:,} are read"


def _json(path: Path) -> Any:
    """What a file holds; text where it is no JSON, to say why."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{path} is no JSON: {str(error)[:200]}"


def _config_problems(folder: Path, trust_remote_code: bool) -> Iterator[str]:
    config = _json(folder / "config.json")
    if not isinstance(config, dict):
        text = isinstance(config, str) and config.startswith(str(folder))
        yield config if text else f"{folder}/config.json holds no JSON object"
        return
    kind = config.get("model_type")
    own_code = "auto_map" in config
    if not isinstance(kind, str) or (kind not in KNOWN_KINDS and not own_code):
        near = nearest(str(kind), KNOWN_KINDS) if kind else None
        hint = f"; did you mean {near}?" if near else ""
        yield f"{folder}/config.json: the model_type {str(kind)[:60]!r} is not known{hint}"
    elif kind not in KNOWN_KINDS and not trust_remote_code:
        yield (
            f"{folder} brings Python code of its own (auto_map), which is not run; where you trust "
            "it: trust_remote_code"
        )
    if config.get("quantization_config") and (word := method_of(config)):
        yield from (f"{folder}: {text}" for text in stored_problems(word[:40]))
    for most, keys in MOST.items():
        for key in keys:
            value = config.get(key)
            if value is not None and (type(value) is not int or not 0 < value <= most):
                shown = repr(value)[:40]
                yield f"{folder}/config.json: {key} is {shown}; expected 1 to {most:,}"


def _index_problems(folder: Path) -> list[str]:
    """Where the weights lie in several files: an index that is wrong about them."""
    if (folder / "model.safetensors").exists() or not (folder / INDEX).exists():
        return []
    index = _json(folder / INDEX)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(v, str) for v in weights.values()):
        return [index if isinstance(index, str) else f"{folder}/{INDEX} has no proper weight_map"]
    names = sorted(set(weights.values()))
    outside = [name for name in names if name != os.path.basename(name) or name.startswith(".")]
    if outside:
        return [f"{folder}/{INDEX} leads out of the folder: {', '.join(outside[:_SHOWN])}"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        return [f"{folder} lacks {len(missing)} weight files: {', '.join(missing[:_SHOWN])}"]
    found = [p.name for p in folder.glob("*.safetensors") if _SHARD.fullmatch(p.name)]
    if extra := sorted(set(found) - set(names)):
        return [f"{folder}/{INDEX} does not name {', '.join(extra[:_SHOWN])}"]
    return _shard_problems(folder, weights, names)


def _shard_problems(folder: Path, weights: dict[str, str], names: list[str]) -> list[str]:
    holders: dict[str, list[str]] = {}
    for name in names:
        header = read_header(folder / name)
        if isinstance(header, str):
            return [header]
        for key in header:
            holders.setdefault(key, []).append(name)
    twice = [f"{key} in {', '.join(files)}" for key, files in holders.items() if len(files) > 1]
    absent = [key for key, name in weights.items() if name not in holders.get(key, ())]
    problems = [f"{len(twice)} tensors lie in two files: {'; '.join(twice[:_SHOWN])}"] * bool(twice)
    if absent:
        problems.append(
            f"{len(absent)} tensors are not where {INDEX} says: {', '.join(absent[:_SHOWN])}"
        )
    return problems


def _weight_problems(folder: Path) -> list[str]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return [_no_weights(folder)]
    problems = []
    for path in files:
        header = read_header(path)
        if isinstance(header, str):
            problems.append(header)
            continue
        kinds = {str(entry.get("dtype")) for entry in header.values() if isinstance(entry, dict)}
        if not _lies_quantized(folder) and (other := sorted(kinds & {*_OTHER_NUMBERS})):
            problems.append(
                f"{path} holds numbers of the type {', '.join(other)}; a base is read in F32, F16, "
                "BF16 or F64"
            )
    return problems


def _lies_quantized(folder: Path) -> bool:
    """Whether the config says that the weights are stored in other numbers."""
    config = _json(folder / "config.json")
    return isinstance(config, dict) and bool(config.get("quantization_config"))


def _no_weights(folder: Path) -> str:
    text = f"{folder} has no *.safetensors"
    if any(folder.glob("*.gguf")):
        return f"{text}; GGUF is not read: name the base it was made from"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return (
            f"{text}; its pickled weights are never loaded: convert them to safetensors first, "
            "where you trust them: safetensors.torch.save_file(torch.load(FILE, weights_only=True),"
            " 'model.safetensors')"
        )
    return text


def read_header(path: Path) -> dict[str, Any] | str:
    """Name -> dtype, shape, offsets of a safetensors file; text where it is none, to say why."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > min(MOST_HEADER, size - 8):
            return f"{path} is no safetensors file, or is cut off ({size:,} bytes)"
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return f"{path} has a broken header: {str(error)[:100]}"
    if not isinstance(header, dict):
        return f"{path} has a broken header: no JSON object"
    header.pop("__metadata__", None)
    ends = [entry["data_offsets"][1] for entry in header.values() if _has_offsets(entry)]
    if len(ends) != len(header) or max(ends, default=0) != size - 8 - length:
        return f"{path} is cut off, or its header is wrong about its {size:,} bytes"
    return header


def _has_offsets(entry: Any) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return isinstance(offsets, list) and len(offsets) == 2 and type(offsets[1]) is int
