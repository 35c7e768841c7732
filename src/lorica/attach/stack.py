"""The stack of layers of a transformers model: which module it is, and what it can be given."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

_POSITIONS = ("position_embeddings", "embed_positions", "wpe")
"""What tables of absolute positions are called."""


def takes(module: nn.Module) -> list[str]:
    """Names of the arguments of its forward, in order, also where its class was swapped."""
    own = getattr(type(module), "_lorica_base", type(module))
    return list(inspect.signature(own.forward).parameters)[1:]


def geometry(module: Any) -> dict[str, Any]:
    """What methods and prompts must know of a stack; see `methods.method.Layer.geometry`."""
    config = module.config.get_text_config()
    decodes = "encoder_hidden_states" in takes(module) and config.is_encoder_decoder
    own = ("decoder_attention_heads",) if decodes else ()
    heads = _first(config, *own, "num_attention_heads", "n_head", "num_heads", default=1)
    width = _first(config, "hidden_size", "n_embd", "d_model", default=0)
    own = ("decoder_layers", "num_decoder_layers") if decodes else ()
    layers = (*own, "num_hidden_layers", "num_layers", "n_layer")
    found = {
        "num_layers": _first(config, *layers, default=0),
        "num_heads": _key_value_heads(config, heads),
        "head_dim": _first(config, "head_dim", "d_kv", default=width // heads),
        "positions": _positions(module),
        "bidirectional": is_bidirectional(module),
    }
    return found | {"no_prefix": _no_prefix(module, config)}


def is_bidirectional(module: Any) -> bool:
    """Whether it reads the whole text at once (BERT, the encoder of T5): nothing is cached."""
    own, config = takes(module), module.config
    if getattr(module, "is_decoder", None) is False or "past_key_values" not in own:
        return True
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not config.is_encoder_decoder and not getattr(config, "is_decoder", False)


def _key_value_heads(config: Any, heads: int) -> int:
    if getattr(config, "new_decoder_architecture", False):  # Falcon's later layout
        return config.num_kv_heads
    if getattr(config, "multi_query", False):
        return 1
    return getattr(config, "num_key_value_heads", None) or heads


def _positions(module: nn.Module) -> int | None:
    """Entries of its table of absolute positions; None where it has none."""
    for name, inner in module.named_modules():
        if isinstance(inner, nn.Embedding) and name.endswith(_POSITIONS):
            padding = getattr(inner, "padding_idx", None)
            taken = padding + 1 if padding is not None else getattr(inner, "offset", 0)
            return inner.num_embeddings - taken
    return None


def _no_prefix(module: nn.Module, config: Any) -> tuple[str, ...]:
    """Why its layers cannot be given keys and values in front, in sentences."""
    found = []
    if "past_key_values" not in takes(module):
        found.append("prefix-tuning needs layers that take past keys and values; these take none")
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        found.append(f"some layers keep no keys and values of their own ({', '.join(other)})")
    uneven = ("kv_lora_rank", "num_kv_shared_layers", "global_head_dim", "is_heterogeneous")
    found += [
        f"its layers have keys and values of different sizes ({key})"
        for key in uneven
        if getattr(config, key, None)
    ]
    return tuple(found)


def _first(config: Any, *names: str, default: int) -> int:
    return next((v for n in names if isinstance(v := getattr(config, n, None), int)), default)
