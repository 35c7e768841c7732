"""Which numbers and which device a base gets where the user leaves that open."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

SLOW_BFLOAT16 = (
    "this processor has no instructions for bfloat16: that saves memory, and is many times slower "
    "than dtype: float32"
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype | Literal["auto"]:
    """The dtype of the frozen weights; see `load_model`. "as-stored" leaves the choice to the
    files.
    """
    if dtype == "as-stored":
        return "auto"
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


def choose_device(device: str) -> torch.device:
    """The device of the model; see `load_model`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def doubts_on(dtype: torch.dtype, device: torch.device) -> list[str]:
    """What the user should be told of numbers of this kind on this device."""
    slow = device.type == "cpu" and dtype == torch.bfloat16 and not _cpu_has_bfloat16()
    return [SLOW_BFLOAT16] if slow else []


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags
