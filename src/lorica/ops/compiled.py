"""The kernel by which bitsandbytes unpacks four bits on a CPU with AVX-512, where it is installed.

It is called in its shared library, into memory of ours. The Python package is not imported, which
takes a second and may ask a hub for further kernels. Every block is given to it as a row of its
own: in some rows that are no multiple of a block, such as 160 numbers, it reads the scales wrongly.

Other versions than those tested here may want other arguments, so they are left alone.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, int, Tensor], None]
"""Packed bytes, magnitudes in float32, numbers of a block, where the numbers go; all contiguous,
of whole blocks."""

TESTED = ("0.50.",)
"""Beginnings of the versions whose library is called."""

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def kernel_of(book: str, dtype: torch.dtype) -> Kernel | None:
    """The kernel for a word of `four_bit.BOOKS` and the dtype of its output, where there is one."""
    library = _library()
    name = f"cdequantize_blockwise_cpu_{book}_{_DTYPES.get(dtype)}"
    if library is None or not hasattr(library, name):
        return None
    function = getattr(library, name)
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_longlong] * 3
    function.restype = None

    def unpack(packed: Tensor, absmax: Tensor, block: int, out: Tensor) -> None:
        places = packed.data_ptr(), absmax.data_ptr(), out.data_ptr()
        function(*places, block, out.numel() // block, block)

    return unpack


@cache
def _library() -> ctypes.CDLL | None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None  # no faster there than a table
    try:
        version = importlib.metadata.version("bitsandbytes")
        spec = importlib.util.find_spec("bitsandbytes")
        if not version.startswith(TESTED) or spec is None or spec.origin is None:
            return None
        return ctypes.CDLL(str(Path(spec.origin).with_name("libbitsandbytes_cpu.so")))
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None
