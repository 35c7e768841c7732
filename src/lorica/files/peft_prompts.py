"""PEFT's layout of virtual tokens: prompt tuning, P-tuning, prefix tuning.

One tensor `prompt_embeddings`, in which whatever network made the virtual tokens is folded, and the
modules trained whole as `base_model.PATH`: PEFT does not wrap the base for these methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.attach.handle import Adapter
from lorica.attach.layers import describe
from lorica.attach.places import Places
from lorica.attach.prompt import stacks_of
from lorica.base.storage import weight_shape
from lorica.config.resolve import build_method
from lorica.errors import AdapterFileError, ConfigError, TargetError
from lorica.files.found import Found
from lorica.files.peft_config import PEFT_VERSION, TASK_TYPES, PeftConfig, parse_config
from lorica.files.peft_layout import modules_of
from lorica.files.peft_written import whole_names
from lorica.files.safetensors_file import TensorFile
from lorica.methods.copy import Copy
from lorica.methods.method import Tensors
from lorica.methods.p_tuning import PTuning
from lorica.methods.prefix_tuning import PrefixTuning
from lorica.methods.prompt_tuning import PromptTuning

KINDS: dict[str, type] = {
    "PROMPT_TUNING": PromptTuning,
    "P_TUNING": PTuning,
    "PREFIX_TUNING": PrefixTuning,
}
KEY, PREFIX = "prompt_embeddings", "base_model."
_SIZES = ("num_attention_heads", "num_layers", "token_dim")
_COMMON = {"num_virtual_tokens", "num_transformer_submodules", *_SIZES}
_PLACING = ("modules_to_save", "task_type", "base_model_name_or_path")
_SAYS_NOTHING = {"auto_mapping", "inference_mode", "peft_type", "peft_version", "revision"}
_OWN: dict[str, set[str]] = {
    "PROMPT_TUNING": {
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    },
    "P_TUNING": {
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
    },
    "PREFIX_TUNING": {"encoder_hidden_size", "init_weights", "prefix_projection"},
}
"""PEFT's keys of each kind. They tell how the virtual tokens began; the file holds what became."""
_TASK_OF_CLASS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM"}
_TASK_OF_CLASS |= {"ForSequenceClassification": "SEQ_CLS"}


# --- writing --------------------------------------------------------------------------------------


def fits(adapter: Adapter) -> bool:
    """Whether the adapter can be written in this layout.

    On the decoder of an encoder-decoder model PEFT gives some layers the prefix of others, which
    leaves no place for a prefix of their own.
    """
    if _takes_turns(adapter.model, adapter.method):
        return False
    return type(adapter.method) in KINDS.values()


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a config is of this layout."""
    return isinstance(config.get("peft_type"), str) and config["peft_type"] in KINDS


def base_name(config: Mapping[str, Any]) -> str | None:
    """The base that the adapter was made for."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def write(adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors."""
    method: Any = adapter.method
    path, stack = next(iter(stacks_of(adapter.model, method).items()))
    with torch.no_grad():
        tensors = {KEY: _wide(method.fold(adapter.slots[path].tensors).cpu()).contiguous()}
    for place, slot in adapter.slots.items():
        if isinstance(slot.method, Copy):
            for name, tensor in slot.tensors.items():
                tensors[f"{PREFIX}{place}.{name}"] = _wide(tensor.detach().cpu())
    config = {
        **_sizes(stack, method),
        **_settings(adapter),
        "peft_type": next(name for name, kind in KINDS.items() if kind is type(method)),
        "peft_version": PEFT_VERSION,
        "task_type": _task_type(adapter),
        "auto_mapping": None,
        "base_model_name_or_path": adapter.base.get("name") or None,
        "inference_mode": True,
        "revision": None,
        "modules_to_save": whole_names(adapter) or None,
        "num_virtual_tokens": method.num_virtual_tokens,
        "num_transformer_submodules": 1,
    }
    return dict(sorted(config.items())), tensors


def _sizes(stack: nn.Module, method: Any) -> dict[str, int]:
    layer = describe(stack)
    size = layer.geometry
    width = layer.out_features
    if isinstance(method, PrefixTuning):
        width = size["num_heads"] * size["head_dim"]
    return dict(zip(_SIZES, (size["num_heads"], size["num_layers"], width), strict=True))


def _settings(adapter: Adapter) -> dict[str, Any]:
    method: Any = adapter.method
    if isinstance(method, PTuning):
        return {
            "encoder_dropout": 0.0,
            "encoder_hidden_size": method.encoder_hidden_size or None,
            "encoder_num_layers": method.encoder_num_layers,
            "encoder_reparameterization_type": method.encoder_reparameterization_type,
        }
    if isinstance(method, PrefixTuning):
        return {
            "encoder_hidden_size": method.encoder_hidden_size or None,
            "init_weights": None,
            "prefix_projection": method.prefix_projection,
        }
    text, name = method.prompt_tuning_init_text, adapter.base.get("name")
    told = bool(text and name)  # PEFT wants the name of a tokenizer beside a text
    begins = method.prompt_tuning_init.upper()
    return {
        "prompt_tuning_init": begins if told or begins != "TEXT" else "RANDOM",
        "prompt_tuning_init_text": text if told else None,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": name if told else None,
    }


def _task_type(adapter: Adapter) -> str | None:
    known = TASK_TYPES.get(adapter.base.get("task", ""))
    if known is None and _has_encoder(adapter.model):
        return "SEQ_2_SEQ_LM"
    own = type(adapter.model).__name__
    return known or next((t for end, t in _TASK_OF_CLASS.items() if own.endswith(end)), None)


# --- reading --------------------------------------------------------------------------------------


def settings(raw: Mapping[str, Any], folder: Path) -> Any:
    """The settings that a config describes. Raises AdapterFileError for what we do not know."""
    where = folder / "adapter_config.json"
    placing = {key: raw[key] for key in _PLACING if key in raw}
    return _method(raw, parse_config({"peft_type": "LORA", **placing}, str(where)), where)


def read(model: nn.Module, raw: Mapping[str, Any], file: TensorFile, folder: Path) -> Found:
    """Check settings and shapes, then read the tensors.

    Raises:
        AdapterFileError: something does not fit; all problems at once.
    """
    where = folder / "adapter_config.json"
    placing = {key: raw[key] for key in _PLACING if key in raw}
    config = parse_config({"peft_type": "LORA", **placing}, str(where))
    method: Any = _method(raw, config, where)
    try:
        stacks = stacks_of(model, method)
    except TargetError as error:
        raise AdapterFileError(f"{folder}: {error.what}", problems=error.problems) from error
    first, takes_turns = next(iter(stacks)), _takes_turns(model, method)
    if takes_turns:  # it can only be written again as it is
        method = _without_network(method)
    places: Places = {path: (stack, None, method) for path, stack in stacks.items()}
    entries = {key: tuple(entry.shape) for key, entry in file.entries.items()}
    most = 2 if _has_encoder(model) else 1
    problems, rows = _shape_problems(entries.get(KEY), raw, method, stacks, most)
    copies = _copies(model, config, entries, problems)
    places |= {path: (modules_of(model)[path], None, Copy()) for path in copies}
    problems += [
        f"{key}: {entry.dtype} is no type of trained numbers"
        for key, entry in file.entries.items()
        if not entry.dtype.is_floating_point
    ]
    used = {KEY, *(key for keys in copies.values() for key in keys.values())}
    problems += [f"{key}: has no place in this model" for key in entries if key not in used]
    if problems:
        raise AdapterFileError(
            f"{folder} does not fit this {type(model).__name__}",
            problems=problems[:10],
            mend="load the base that the adapter was made for",
        )
    tensors: dict[str, Tensors] = {path: {} for path in stacks}
    made = _wide(file.read(KEY))[:rows]
    if takes_turns:
        made = _as_the_decoder_has_it(made, describe(stacks[first]).geometry["num_layers"])
    tensors[first] = {method.folded: made.contiguous()}
    for path, keys in copies.items():
        tensors[path] = {name: _wide(file.read(key)) for name, key in keys.items()}
    return Found(method, places, tensors, config.base_name, config.task)


def _has_encoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _takes_turns(model: nn.Module, method: Any) -> bool:
    """Whether PEFT gives some layers of this model the prefix of others."""
    return isinstance(method, PrefixTuning) and _has_encoder(model)


def _without_network(method: Any) -> Any:
    """The settings of a prefix whose network is gone."""
    return replace(method, prefix_projection=False, encoder_hidden_size=0)


def _as_the_decoder_has_it(prefix: Tensor, num_layers: int) -> Tensor:
    """PEFT lays the keys and values of all layers twice in a row and deals them out in fours, of
    which a layer uses the first two: layer n has those that stand in the file for 2 n, modulo the
    number of layers.
    """
    layers = prefix.view(prefix.shape[0], num_layers, -1)
    order = [2 * number % num_layers for number in range(num_layers)]
    return layers[:, order].reshape(prefix.shape)


def _method(raw: Mapping[str, Any], config: PeftConfig, where: Path) -> Any:
    name = raw["peft_type"]
    kind: Any = KINDS[name]
    known = _COMMON | _OWN[name] | set(_PLACING) | _SAYS_NOTHING
    problems = [
        f"unknown key {key[:60]!r} with the value {str(value)[:60]!r}"
        for key, value in raw.items()
        if key not in known and value not in (None, False) and value not in ([], {})
    ]
    given = {
        "num_virtual_tokens": raw.get("num_virtual_tokens"),
        "modules_to_save": list(config.method.modules_to_save),
        **_history(raw, name),
    }
    if not problems:
        try:
            return build_method(kind, given)
        except ConfigError as error:
            problems = [error.what, *error.problems]
    raise AdapterFileError(f"{where} cannot be used", problems=problems[:10])


def _history(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """How the virtual tokens began, as far as our settings have words for it."""
    if name == "PROMPT_TUNING":
        begins = str(raw.get("prompt_tuning_init", "RANDOM")).lower()
        text = {"prompt_tuning_init_text": raw.get("prompt_tuning_init_text")}
        return {"prompt_tuning_init": begins, **(text if begins == "text" else {})}
    hidden = raw.get("encoder_hidden_size") or 0
    if name == "P_TUNING":
        kind = raw.get("encoder_reparameterization_type", "MLP")
        layers = {"encoder_num_layers": raw.get("encoder_num_layers", 2)} if kind == "LSTM" else {}
        return {"encoder_reparameterization_type": kind, "encoder_hidden_size": hidden, **layers}
    projects = raw.get("prefix_projection", False)
    return {"prefix_projection": projects, **({"encoder_hidden_size": hidden} if projects else {})}


def _shape_problems(
    there: tuple[int, ...] | None,
    raw: Mapping[str, Any],
    method: Any,
    stacks: Mapping[str, nn.Module],
    most: int,
) -> tuple[list[str], int]:
    """What is wrong with the virtual tokens of a file; and how many of its rows act.

    For encoder-decoder models PEFT writes as many rows for the decoder, and uses the encoder's.
    """
    layer, count = describe(next(iter(stacks.values()))), method.num_virtual_tokens
    if found := method.problems(layer):
        return found, count
    size = layer.geometry
    columns = layer.out_features
    if isinstance(method, PrefixTuning):
        columns = 2 * size["num_layers"] * size["num_heads"] * size["head_dim"]
    parts = raw.get("num_transformer_submodules") or 1
    if parts not in (1, most):
        return [f"num_transformer_submodules is {str(parts)[:40]}, which PEFT cannot run"], count
    if isinstance(method, PrefixTuning):
        parts = 1
    wanted = (parts * count, columns)
    if there is None:
        return [f"{KEY}: missing from the file"], count
    return ([] if there == wanted else [f"{KEY}: {there}, but this base needs {wanted}"]), count


def _copies(
    model: nn.Module,
    config: PeftConfig,
    entries: Mapping[str, tuple[int, ...]],
    problems: list[str],
) -> dict[str, dict[str, str]]:
    """Path of a module trained whole -> its parameters -> their keys."""
    found = {}
    for path, module in modules_of(model).items():
        names = [name for name, parameter in module._parameters.items() if parameter is not None]
        own = {name: weight_shape(module, name) for name in names}
        keys = {name: f"{PREFIX}{path}.{name}" for name in own}
        if not path or not config.may_save_whole(path) or not entries.keys() & set(keys.values()):
            continue
        found[path] = keys
        problems += [
            f"{key}: missing, or not of {own[name]}"
            for name, key in keys.items()
            if entries.get(key) != own[name]
        ]
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
