"""What bitsandbytes does with its 4-bit layers on a CPU, and training must not meet.

On a processor with AVX-512 and bfloat16 products, bitsandbytes 0.50 packs a layer anew at its first
pass without gradients. From then on no gradient goes through that layer: what lies below it would
stop learning without a word. And its AVX-512 kernel misreads some rows that are no multiple of a
block: those of 160 numbers, though not those of 172. So what it reads is compared.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lorica.base.storage import read_weight
from lorica.errors import BaseModelError

_SWITCH = "support_avx512bf16_for_cpu"
"""Attribute of a layer by which bitsandbytes decides whether it packs it anew."""


def check_foreign(model: nn.Module) -> None:
    """Whether bitsandbytes computes with every one of its layers what it was stored to be.

    Raises:
        BaseModelError: some of them were packed anew, or are misread.
    """
    repacked, misread = [], []
    judged: dict[tuple, bool] = {}
    for path, module, state in _layers(model):
        if module.weight.device.type != "cpu":
            continue
        if getattr(state, "packing_format_for_cpu", False):
            repacked.append(path)
        elif state.shape[-1] % state.blocksize:  # else no block goes over the end of a row
            kind = state.quant_type, state.blocksize, tuple(state.shape)
            if kind not in judged:
                judged[kind] = _is_misread(module, state)
            misread += [path] * judged[kind]
    words = {
        "were packed for inference, which ends gradients": repacked,
        "are misread, as rows may be that are no multiple of a block": misread,
    }
    faults = [f"{fault}: {_some(paths)}" for fault, paths in words.items() if paths]
    if faults:
        raise BaseModelError(
            "layers of bitsandbytes in this base cannot be trained through on this processor: they "
            + "; others ".join(faults),
            mend="let lorica read the same bytes: lorica.load_model(PATH), or with quantize='nf4'"
            + ("; or load it anew and attach before the first forward pass" if repacked else ""),
        )


def hold(model: nn.Module) -> list[nn.Module]:
    """Have layers of bitsandbytes stay as they are stored; gives those that would not have."""
    held = [module for _, module, _ in _layers(model) if getattr(module, _SWITCH, False)]
    for module in held:
        setattr(module, _SWITCH, False)
    return held


@contextmanager
def as_stored(model: nn.Module) -> Iterator[None]:
    """Check the layers of bitsandbytes, and have them stay as they are inside the block."""
    check_foreign(model)
    held = hold(model)
    try:
        yield
    finally:
        release(held)


def release(held: list[nn.Module]) -> None:
    """Undo `hold`."""
    for module in held:
        setattr(module, _SWITCH, True)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Paths, layers and states of the 4-bit layers of bitsandbytes."""
    for path, module in model.named_modules():
        weight: Any = module._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        if state is not None:
            yield path, module, state


def _is_misread(module: Any, state: Any) -> bool:
    library: Any = sys.modules["bitsandbytes.functional"]  # it is loaded: this layer is its own
    theirs = library.dequantize_4bit(module.weight.data, state).float()
    return not torch.allclose(theirs, read_weight(module).float(), rtol=1e-2, atol=1e-6)


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
