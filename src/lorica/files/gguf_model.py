"""A whole model as one GGUF file: sizes, tokenizer and every weight, in F32, F16, BF16 or Q8_0.

Vectors and norms stay in F32, and of Q8_0 whatever has rows that are no multiple of 32 is F16, as
llama.cpp's own tools have it. Weights are converted and written one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorica.attach.handle import adapters
from lorica.errors import AdapterFileError
from lorica.files.folder import new_file
from lorica.files.gguf_names import (
    Architecture,
    architecture_of,
    heads_of,
    names_of,
    package,
    to_pairs,
)
from lorica.files.gguf_vocab import add_vocabulary, model_name
from lorica.files.peft_layout import modules_of

DTYPES = {"float16": "F16", "q8_0": "Q8_0", "float32": "F32", "bfloat16": "BF16"}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
_TANH, _SHOWN = ("gelu_pytorch_tanh", "gelu_new"), 10
_ACTIVATIONS = {"gemma": _TANH, "gemma2": _TANH, "gemma3": _TANH, "phi2": _TANH, "gpt2": _TANH}
"""What llama.cpp has in the feed-forward, whatever the config says; else it is SiLU."""
_WIDE = ("position_embd.weight",)


def write(
    model: nn.Module, tokenizer: Any, path: Path, dtype: str, overwrite: bool = False
) -> list[str]:
    """Write the file; returns what the user should be told.

    Args:
        model: of transformers, without adapters: merge them first.
        tokenizer: its tokenizer.
        dtype: of the matrices, one of `DTYPES`.

    Raises:
        AdapterFileError: llama.cpp computes something else for such a model, or has no such weight
            or tokenizer. Nothing is written then.
    """
    gguf, arch = package(), architecture_of(model)
    if left := adapters(model):
        raise AdapterFileError(
            f"adapters are attached ({', '.join(left)}); the file would be the bare base",
            mend="merge them first, or detach them",
        )
    names = _checked_names(model, arch)
    config: Any = model.config
    config = config.get_text_config()
    with new_file(path, overwrite=overwrite) as temporary:
        writer = gguf.GGUFWriter(temporary, arch.name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(model_name(path.stem, tokenizer))
        notes = _sizes(writer, gguf, config, arch)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[DTYPES[dtype]]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, tokenizer, config.vocab_size)
        _write_weights(writer, gguf, model, names, arch, DTYPES[dtype])
        writer.close()
    return notes


def _write_weights(
    writer: Any, gguf: Any, model: nn.Module, names: dict[str, str], arch: Architecture, dtype: str
) -> None:
    """First the table of all weights, then their data, one at a time."""
    plan = [
        (name, tensor, _stored(gguf, name, tensor, dtype))
        for name, tensor in _weights(model, names, arch)
    ]
    for name, tensor, kind in plan:
        shape, size = tuple(tensor.shape), math.prod(tensor.shape)
        block, width = gguf.GGML_QUANT_SIZES[kind]
        raw = kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        plain = np.float16 if kind == gguf.GGMLQuantizationType.F16 else np.float32
        if raw:
            shape, plain = gguf.quant_shape_to_byte_shape(shape, kind), np.uint8
        writer.add_tensor_info(
            name, shape, np.dtype(plain), size // block * width, raw_dtype=kind if raw else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor, kind in plan:
        values = _turned(model, name, tensor, arch).float().cpu().contiguous().numpy()
        writer.write_tensor_data(gguf.quants.quantize(values, kind))


def _weights(
    model: nn.Module, names: dict[str, str], arch: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name of every weight, and the weight as (O, I)."""
    modules = modules_of(model)
    given = dict(model.named_parameters(remove_duplicate=False))
    for path, name in names.items():
        tensor = given[path].detach()
        module = modules[path.rpartition(".")[0]]
        yield name, tensor.t() if isinstance(module, Conv1D) and tensor.dim() == 2 else tensor
    if (factors := _rope_factors(model)) is not None:
        yield from factors.items()


def _turned(model: nn.Module, name: str, tensor: Tensor, arch: Architecture) -> Tensor:
    """A weight with llama.cpp's order of rows, and its norms."""
    if heads := heads_of(model, name):
        return to_pairs(tensor, heads)
    if arch.norm_shift and name.endswith("norm.weight"):
        return tensor.float() + arch.norm_shift
    return tensor


def _stored(gguf: Any, name: str, tensor: Tensor, dtype: str) -> Any:
    kind = gguf.GGMLQuantizationType
    if tensor.dim() < 2 or name in _WIDE or name.startswith("rope_"):
        return kind.F32
    if dtype == "Q8_0" and tensor.shape[-1] % 32:
        return kind.F16
    return kind[dtype]


def _checked_names(model: nn.Module, arch: Architecture) -> dict[str, str]:
    """Path of a parameter -> llama.cpp's name; a tied output layer is left out, as it is there.

    Raises:
        AdapterFileError: a parameter without a name, or a config that llama.cpp would not follow.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config()
    given = dict(model.named_parameters(remove_duplicate=False))
    names = names_of(model, given)
    table = next((given[path] for path, name in names.items() if name == "token_embd.weight"), None)
    problems = []
    for path, parameter in given.items():
        tied = parameter is table and names.get(path) != "token_embd.weight"
        if tied:
            names.pop(path, None)
        elif path not in names or (names[path] == "output.weight" and not arch.has_output):
            problems.append(f"{path}: llama.cpp has no such weight for {arch.name}")
    problems += _config_problems(config, arch)
    if problems:
        raise AdapterFileError(
            f"this {type(model).__name__} cannot be written as GGUF", problems=problems[:_SHOWN]
        )
    return names


def _config_problems(config: Any, arch: Architecture) -> list[str]:
    """What llama.cpp computes otherwise than this config says."""
    found = []
    given = next(
        (
            v
            for k in ("hidden_activation", "hidden_act", "activation_function")
            if (v := getattr(config, k, None))
        ),
        None,
    )
    wanted = _ACTIVATIONS.get(arch.name, ("silu", "swish"))
    if given is not None and given not in wanted:
        found.append(f"its feed-forward has {given}; llama.cpp has {wanted[0]} for {arch.name}")
    scalar, size = getattr(config, "query_pre_attn_scalar", None), getattr(config, "head_dim", None)
    if scalar is not None and scalar != size and config.num_hidden_layers not in (46, 62):
        found.append(f"query_pre_attn_scalar is {scalar}; llama.cpp takes head_dim, {size}")
    every = {"gemma2": 2, "gemma3": 6}.get(arch.name)
    kinds = getattr(config, "layer_types", None)
    if every and kinds:
        usual = [
            "full_attention" if (i + 1) % every == 0 else "sliding_attention"
            for i in range(len(kinds))
        ]
        if list(kinds) != usual:
            found.append(f"layer_types: llama.cpp has full attention in every {every}th layer")
    for name, rope in _ropes(config).items():
        kind = rope.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3", "longrope"):
            found.append(f"rope_parameters {name}: the type {kind} is not written")
    if getattr(config, "qk_layernorm", False):
        found.append("qk_layernorm: llama.cpp's phi2 has none")
    return found


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary settings by the kind of layer; one entry for models with one kind."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = {k: v for k, v in given.items() if isinstance(v, dict) and k.endswith("_attention")}
    return nested or ({"full_attention": dict(given)} if given else {})


def _sizes(writer: Any, gguf: Any, config: Any, arch: Architecture) -> list[str]:
    """The numbers that llama.cpp needs besides weights; returns what the user should be told."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    writer.add_feed_forward_length(inner or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    )
    writer.add_vocab_size(config.vocab_size)
    rms = getattr(config, "rms_norm_eps", None)
    if rms is not None:
        writer.add_layer_norm_rms_eps(rms)
    else:
        eps = (getattr(config, key, None) for key in ("layer_norm_eps", "layer_norm_epsilon"))
        writer.add_layer_norm_eps(next(value for value in eps if value is not None))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    for name, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if (value := getattr(config, name, None)) is not None:
            add(value)
    _add_rope(writer, gguf, config, arch, head)
    return _add_window(writer, config, arch)


def _add_rope(writer: Any, gguf: Any, config: Any, arch: Architecture, head: int) -> None:
    ropes = _ropes(config)
    if not ropes:
        return
    main = ropes.get("full_attention") or next(iter(ropes.values()))
    writer.add_rope_dimension_count(int(head * main.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(main["rope_theta"])
    if "sliding_attention" in ropes and len(ropes) > 1:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    kind = main.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(main["factor"])
    if kind == "longrope":
        first = main["original_max_position_embeddings"]
        scale = config.max_position_embeddings / first
        attention = main.get("attention_factor")
        if attention is None:
            attention = math.sqrt(1 + math.log(scale) / math.log(first)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(attention)
    if arch.name == "phi3":
        first = main.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(first)


def _add_window(writer: Any, config: Any, arch: Architecture) -> list[str]:
    """Sliding windows, where llama.cpp knows them for the architecture."""
    window = getattr(config, "sliding_window", None)
    if arch.name in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(window or 0)
        return []
    used = getattr(config, "use_sliding_window", True)
    if window and used and window < config.max_position_embeddings:
        return [
            f"the model looks back {window} tokens at most (sliding_window); llama.cpp has no such "
            f"limit for {arch.name}, so longer texts get other answers"
        ]
    return []


def _rope_factors(model: nn.Module) -> dict[str, Tensor] | None:
    """What divides each rotary frequency, where the config scales them one by one."""
    config: Any = model.config
    config = config.get_text_config()
    main = _ropes(config).get("full_attention", {})
    kind = main.get("rope_type")
    if kind == "longrope":
        return {
            "rope_factors_long.weight": torch.tensor(main["long_factor"], dtype=torch.float32),
            "rope_factors_short.weight": torch.tensor(main["short_factor"], dtype=torch.float32),
        }
    if kind != "llama3":
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = main["rope_theta"] ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    lengths = 2 * math.pi / frequencies
    first, low, high = (
        main[key]
        for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = ((first / lengths - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / main["factor"] + smooth)).float()}
