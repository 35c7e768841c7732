"""Which ops have a Triton twin, and when it is taken.

A twin has the signature and the meaning of its op. It is taken for CUDA tensors where Triton can be
imported (torch's CUDA builds bring it along); everywhere else, and under `torch.compile`, whose
compiler fuses by itself, the torch path of the op runs. What a twin saves, in bytes, stands in
docs/gpu.md. Triton's own interpreter (`TRITON_INTERPRET=1`) takes CPU tensors too: that is how the
twins are tested on machines without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

TWINS = {
    "cross_entropy": ("linear_cross_entropy",),
    "four_bit": ("packed_product",),
    "lora": ("lora_linear", "adapted_linear"),
    "rms_norm": ("rms_norm",),
    "rope": ("rotate",),
    "swiglu": ("swiglu",),
}
"""File of this folder -> the functions it offers."""

_HALF_ONLY = {"lora_linear", "adapted_linear", "packed_product"}
"""Matrix products: in float32 they find no tensor cores, and those of torch are the better ones."""

_FILE_OF = {name: file for file, names in TWINS.items() for name in names}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BF16_SINCE = (8, 0)  # compute capability of the first GPUs that multiply bfloat16


def twin(op: str, *tensors: Tensor) -> Callable[..., Any] | None:
    """The Triton function for `op`, or None where the torch path is to run.

    Args:
        op: a name that `TWINS` lists.
        tensors: the floating-point arguments that it would be given.
    """
    file, first = _FILE_OF[op], tensors[0]
    if torch.compiler.is_compiling() or not (first.is_cuda or _interprets()):
        return None
    if any(t.dtype not in _DTYPES or t.device != first.device for t in tensors):
        return None
    if op in _HALF_ONLY and any(t.dtype == torch.float32 for t in tensors):
        return None
    narrow = any(t.dtype == torch.bfloat16 for t in tensors)
    if first.is_cuda and not (_installed() and _able(first.device, narrow)):
        return None
    return getattr(import_module(f"lorica.ops.triton.{file}"), op)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _able(device: torch.device, bf16: bool) -> bool:
    """Whether Triton compiles for this device: from Volta on; bfloat16 from Ampere on."""
    return torch.cuda.get_device_capability(device) >= (_BF16_SINCE if bf16 else (7, 0))


@cache
def _interprets() -> bool:
    """Whether Triton's interpreter is on; read once, as Triton does."""
    return os.environ.get("TRITON_INTERPRET") == "1"
