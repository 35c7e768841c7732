"""What all twins share: starting a kernel, and seeing a tensor as rows."""

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` over `grid` on the device of its first argument; nothing where there is no work.

    Triton launches on the current device, which need not be that of the tensors.
    """
    if 0 in grid:
        return
    if not arguments[0].is_cuda:
        kernel[grid](*arguments, **constants)
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


def rows_of(x: Tensor) -> Tensor:
    """(..., D) as (rows, D) with neighbouring columns: a copy only where the strides forbid."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def block(width: int, most: int, least: int = 16) -> int:
    """The power of two that covers `width`, between `least` and `most`."""
    return max(least, min(most, 1 << (max(width, 1) - 1).bit_length()))


def pieces(size: int, length: int) -> int:
    """How many pieces of this length cover `size`."""
    return -(-size // length)
