"""NF4: four bits for numbers that are normally distributed, simulated in torch.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314), section 3
and appendix E: sixteen values that a standard normal distribution fills equally, in blocks that are
scaled by their largest magnitude. Nothing is packed here: the rounded numbers come back as numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The code book, as published."""

BLOCK = 64
"""Numbers that share a scale."""


def nf4_rounded(weight: Tensor) -> Tensor:
    """What is left of a weight of any shape in NF4, in float32.

    Semantics: each block of 64 in memory order is c * max|block|, with c the nearest of the code
    book to block / max|block|. The last block may be shorter. The scales stay in float32.
    """
    flat = weight.detach().float().flatten()
    rest = -flat.numel() % BLOCK
    blocks = F.pad(flat, (0, rest)).view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    book = torch.tensor(NF4, device=flat.device)
    middles = (book[1:] + book[:-1]) / 2
    codes = torch.bucketize(blocks / scales.clamp_min(1e-30), middles)
    return (book[codes] * scales).flatten()[: flat.numel()].view(weight.shape)
