"""Quantize the layers of a base, in memory or on the way in.

Linear layers are quantized; embeddings, norms and the output head stay in the dtype of the base,
being few, or needed for every word. A quantizer takes one file and one line of QUANTIZERS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lorica.base import four_bit, int8
from lorica.base.ends import end_layer
from lorica.base.quantized import Origin, QuantizedLinear, plain, quantized
from lorica.base.quantizer import Quantizer
from lorica.errors import BaseModelError, folded, nearest

QUANTIZERS: dict[str, Quantizer] = {
    "nf4": four_bit.NF4(),
    "fp4": four_bit.FP4(),
    "int8": int8.Int8(),
}
"""Word -> quantizer with its usual settings."""

_HEADS = {"classifier", "score", "qa_outputs", "pre_classifier", "classification_head", "lm_head"}
"""What transformers calls the modules of a head."""

_READERS = (four_bit.stored_as, int8.stored_as)
"""Entries of a state dict below one module -> the quantizer that made them."""


def quantizer_of(word: str | Quantizer, **settings: Any) -> Quantizer:
    """A quantizer by its word, with these settings.

    Raises:
        BaseModelError: there is none of this word, or it has no such setting.
    """
    if not isinstance(word, str):
        return word
    if word not in QUANTIZERS:
        near = nearest(word, QUANTIZERS)
        raise BaseModelError(
            f"there is no quantizer {word!r}",
            expected=f"one of: {', '.join(QUANTIZERS)}",
            mend=f"did you mean {near}?" if near else None,
        )
    try:
        made = replace(QUANTIZERS[word], **settings)  # type: ignore[type-var]
    except TypeError as error:
        raise BaseModelError(f"{word} has no setting {', '.join(settings)}") from error
    return made


def quantizable(model: nn.Module, *, head: bool = False) -> dict[str, nn.Linear]:
    """The layers that a quantizer takes, by path: plain linear layers with a weight of their own.

    Args:
        head: the output layers too, where their weight is not that of an embedding.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    left = set() if head else _kept(model)
    tied = _tied(model)
    float32 = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    found: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        alone = type(module) is nn.Linear and owners[id(module.weight)] == 1
        parts = path.split(".")
        if (
            alone
            and f"{path}.weight" not in tied
            and not any(path == kept or path.startswith(f"{kept}.") for kept in left)
            and not any(name in parts for name in float32)
            and "parametrizations" not in module._modules
        ):
            found[path] = cast(nn.Linear, module)
    return found


def _kept(model: nn.Module) -> set[str]:
    """Paths of the output heads: what the model says of itself, and what they are called."""
    head = end_layer(model)
    kept = {path for path, module in model.named_modules() if module is head}
    return kept | {name for name, _ in model.named_children() if name in _HEADS}


def _tied(model: nn.Module) -> set[str]:
    """Parameters that a model of transformers ties, or will tie when it is loaded."""
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    if isinstance(keys, Mapping):
        return {*keys, *keys.values()}
    return set(keys)


@torch.no_grad()
def quantize_model(
    model: nn.Module, quantizer: str | Quantizer, *, head: bool = False
) -> list[str]:
    """Quantize the layers of a model that is in memory, one after the other.

    The layers stay the same objects under the same paths; see `base.quantized`.

    Args:
        quantizer: a word of QUANTIZERS, or one with settings of its own.
        head: quantize the output head too.

    Returns:
        the paths of the layers.

    Raises:
        BaseModelError: a weight is not finite, or there is no layer to quantize; nothing was
            changed then.
    """
    kind = quantizer_of(quantizer)
    layers = quantizable(model, head=head)
    check(kind, layers, type(model).__name__)
    broken = [path for path, module in layers.items() if not module.weight.isfinite().all()]
    if broken:
        raise BaseModelError(
            "weights that are NaN or infinite cannot be quantized",
            problems=folded((path, "holds such numbers") for path in broken),
        )
    for module in layers.values():
        weight = module.weight.detach()
        quantized(module, kind, kind.pack(weight), weight.dtype)
    _note(model, kind.word, digest_of_packed(model))
    return list(layers)


@torch.no_grad()
def dequantize_model(model: nn.Module) -> None:
    """Turn every layer that Lorica quantized into a plain one, in the dtype that it stood for.

    The layers stay the same objects. No adapter may sit on them.
    """
    for _, module in list(quantized_layers(model)):
        plain(module, module.packed().numbers())
    _note(model, None, "")


def _note(model: nn.Module, word: str | None, digest: str) -> None:
    """What is known of the base is no longer what its files said."""
    base = model.__dict__.get("_lorica_base")
    if base is not None:
        model.__dict__["_lorica_base"] = replace(base, quantize=word, digest=digest)


def digest_of_packed(model: nn.Module) -> str:
    """SHA-256 over names and bytes of all packed weights, and over names and shapes of what else a
    model saves: the same in whatever dtype that is computed with.
    """
    digest = hashlib.sha256()
    layers = dict(quantized_layers(model))
    for path, layer in sorted(layers.items()):
        for name, tensor in sorted(layer.stored().items()):
            digest.update(f"{path}.{name}".encode())
            raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(raw.numpy().data)
    for name, tensor in sorted(model.state_dict().items()):
        if not any(path in layers for path in _above(name)):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
    return digest.hexdigest()


def _above(name: str) -> list[str]:
    """The paths that a name may lie below."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def check(kind: Quantizer, layers: Mapping[str, nn.Linear], name: str) -> None:
    """Raises BaseModelError where a quantizer has nothing to do, or cannot store these layers."""
    if not layers:
        raise BaseModelError(
            f"{name} has no layer to quantize",
            expected="linear layers (nn.Linear) with weights of their own outside the head",
            mend="load it without quantize",
        )
    shapes = {path: (m.out_features, m.in_features) for path, m in layers.items()}
    problems = folded((p, text) for p, shape in shapes.items() for text in kind.problems(shape))
    if problems:
        raise BaseModelError(f"{kind.word} cannot store these layers", problems=problems[:20])


def packed_weight_of(kind: Quantizer, weight: Tensor, path: str) -> dict[str, Tensor]:
    """A weight, stored. Raises BaseModelError where it is not finite."""
    if not weight.isfinite().all():
        raise BaseModelError(f"{path} holds numbers that are NaN or infinite")
    return kind.pack(weight)


def make_room(model: nn.Module, quantizers: Mapping[str, Quantizer], dtype: torch.dtype) -> None:
    """Turn layers into quantized ones without numbers, for a state dict or a plan.

    Args:
        quantizers: by the path of the layer.
        dtype: of the weights that they stand for.
    """
    for path, kind in quantizers.items():
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear)
        shape = module.out_features, module.in_features
        quantized(module, kind, kind.empty(shape, module.weight.device), dtype)


def recognise(entries: Mapping[str, Tensor]) -> Quantizer | None:
    """The quantizer that made the entries of a state dict below one module; None where none did."""
    return next((kind for reader in _READERS if (kind := reader(entries)) is not None), None)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The layers that Lorica quantized, by path."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield path, module


def remember_origins(model: nn.Module, files: Iterable[Path]) -> None:
    """Note for every quantized layer where its weight lies in full, if a file has it by that name;
    for starts from what quantization took away.
    """
    layers = dict(quantized_layers(model))
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118
                layer = layers.get(key.removesuffix(".weight"))
                if layer is not None and key.endswith(".weight"):
                    layer.origin = Origin(file, key)


def bytes_by_storage(model: nn.Module) -> dict[str, int]:
    """Bytes of the parameters of a plain model in every storage: "float32", "bfloat16", and by each
    quantizer, where the layers that it leaves alone are in bfloat16. No weight is looked at.
    """
    number = sum(p.numel() for p in model.parameters())
    found = {"float32": 4 * number, "bfloat16": 2 * number}
    layers = quantizable(model).values()
    rest = 2 * (number - sum(m.in_features * m.out_features for m in layers))
    for word, kind in QUANTIZERS.items():
        shapes = [(m.out_features, m.in_features) for m in layers]
        stored = [t for s in shapes for t in kind.empty(s, torch.device("meta")).values()]
        found[word] = rest + sum(t.numel() * t.element_size() for t in stored)
    return found


def quantization_of(model: nn.Module) -> str | None:
    """How the layers of a model are stored, in words; None where all are plain."""
    kinds = {module.quantizer.settings() for _, module in quantized_layers(model)}
    return "; ".join(sorted(kinds)) or None
