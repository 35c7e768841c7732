"""Numbers in 8 bits: blocks of 256, each with its largest magnitude, and a code dense near 0.

The code is the dynamic map of Dettmers et al. 2022 ("8-bit Optimizers via Block-wise
Quantization", arXiv 2110.02861), value for value that of bitsandbytes: seven decades below 1, each
with twice as many values as the one below it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
"""Numbers that share a scale."""

_DECADES = 7


@dataclass(frozen=True, eq=False)
class Code:
    """What 8 bits stand for.

    A binary search for the nearest value takes a hundred times as long on a CPU as all the rest. So
    a table has, for the upper 16 bits of a float32 (its sign, exponent and 7 bits of fraction), how
    many borders lie below all numbers that begin so; at most one border lies among these, and a
    comparison with it tells the rest. The places are those of the search, exactly.

    Attributes:
        values: (N,) float32, ascending, N at most 256.
        borders: (N,) between a value and the next; infinity after the last.
        first: (65536,) uint8, the table.
    """

    values: Tensor
    borders: Tensor
    first: Tensor

    def to(self, device: torch.device) -> Code:
        return Code(self.values.to(device), self.borders.to(device), self.first.to(device))

    def places(self, x: Tensor) -> Tensor:
        """The nearest values of finite numbers (n,), float32: the lower of two that are as near."""
        begins = x.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
        below = self.first.index_select(0, begins).int()
        return below.add_(self.borders.index_select(0, below) < x)


def dynamic_code(*, signed: bool) -> Code:
    """The dynamic map, with both signs or from 0."""
    values = [0.0, 1.0]
    for i in range(_DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float32)
        middles = 10 ** (i + 1 - _DECADES) * (edges[:-1] + edges[1:]) / 2
        values += middles.tolist()
        values += (-middles).tolist() if signed else []
    return code_of(torch.tensor(sorted(values), dtype=torch.float32))


def code_of(ascending: Tensor) -> Code:
    """The code of these values, (N,) float32 with N at most 256."""
    borders = (ascending[:-1] + ascending[1:]) / 2
    upper = torch.arange(2**16, dtype=torch.int32).bitwise_left_shift(16)
    lowest = upper.where(upper >= 0, upper | 0xFFFF).view(torch.float32).nan_to_num()
    first = torch.bucketize(lowest, borders).to(torch.uint8)
    return Code(ascending, torch.cat([borders, torch.tensor([torch.inf])]), first)


def blocks_of(x: Tensor) -> Tensor:
    """Numbers of any shape, in row-major order, as rows of `BLOCK` (B, 256), float32; zeros fill
    up the last.
    """
    return F.pad(x.reshape(-1).float(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def quantize(blocks: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """Numbers as places in a code.

    Semantics: argmin |code - x / scale|, scale = largest magnitude of the block; the lower of two
    that are as near. Where the code begins with 0, what is above 0 does not become 0: a second
    moment of 0 beside a first moment that is not would make a step of any size.

    Args:
        blocks: finite numbers (B, 256), float32.

    Returns:
        places (B, 256), uint8; and scales (B,), float32.
    """
    scales = blocks.abs().amax(1)
    scaled = blocks / torch.where(scales > 0, scales, 1)[:, None]
    places = code.places(scaled.view(-1)).view(blocks.shape)
    if code.first[0] == 0:  # a code from 0 on
        places = torch.maximum(places, (blocks > 0).int())
    return places.to(torch.uint8), scales


def dequantize(places: Tensor, scales: Tensor, code: Code) -> Tensor:
    """The numbers (B, 256), float32, that places in a code stand for."""
    values = code.values.index_select(0, places.view(-1).int()).view(places.shape)
    return values.mul_(scales[:, None])
