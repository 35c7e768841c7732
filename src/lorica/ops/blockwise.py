"""Numbers in 8 bits: blocks of 256, each with its largest magnitude, and a code dense near 0.

The code is the dynamic map of Dettmers et al. 2022 ("8-bit Optimizers via Block-wise
Quantization", arXiv 2110.02861), value for value that of bitsandbytes: seven decades below 1, each
with twice as many values as the one below it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
"""Numbers that share a scale."""

_DECADES = 7


def dynamic_map(*, signed: bool) -> Tensor:
    """The 256 values that 8 bits stand for, ascending, in float32: with both signs, or from 0."""
    values = [0.0, 1.0]
    for i in range(_DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middles = 10 ** (i + 1 - _DECADES) * (edges[:-1] + edges[1:]) / 2
        values += middles.tolist()
        values += (-middles).tolist() if signed else []
    return torch.tensor(sorted(values))


def quantize_blockwise(x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers as places in a code.

    Semantics: argmin |code - x / scale|, scale = largest magnitude of the block; the lower of two
    that are as near. Where the code begins with 0, what is above 0 does not become 0: a second
    moment of 0 beside a first moment that is not would make a step of any size.

    Args:
        x: numbers of any shape and their dtype; read in row-major order.
        code: (256,), ascending.

    Returns:
        places, uint8, in the shape of `x`; and scales, float32, one per block.
    """
    blocks = F.pad(x.reshape(-1).float(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    scaled = blocks / torch.where(scales > 0, scales, 1)[:, None]
    places = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True)
    if code[0] == 0:
        places = torch.where(blocks > 0, places.clamp(min=1), places)
    return places.view(-1)[: x.numel()].view(x.shape).to(torch.uint8), scales


def dequantize_blockwise(places: Tensor, scales: Tensor, code: Tensor) -> Tensor:
    """The numbers (float32, in the shape of `places`) that places in a code stand for."""
    values = F.pad(code[places.reshape(-1).int()], (0, -places.numel() % BLOCK)).view(-1, BLOCK)
    return (values * scales[:, None]).view(-1)[: places.numel()].view(places.shape)
