"""Weights in four bits a number: NF4 and FP4 in blocks, bit for bit as bitsandbytes stores them.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314), section 3:
a block of numbers is divided by its largest magnitude, and each becomes the place of the nearest of
sixteen values. Double quantization stores the magnitudes themselves, less their mean, in 8 bits.

Two places share a byte, the first in its upper half. Reading goes by a table from a byte to its two
numbers, a few hundred thousand at a time, so that what is gathered is scaled while it lies in the
cache; with AVX-512 by the kernel of bitsandbytes where that is installed, to the same bits in a
third to a fifth of the time (`ops.compiled`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.ops.blockwise import Code, code_of, dynamic_code
from lorica.ops.compiled import Kernel, kernel_of
from lorica.ops.nf4 import NF4

FP4 = (
    *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
    *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
    *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
    *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
)
"""The values of a float with a sign, two bits of exponent and one of fraction, by its four bits."""

BOOKS = {"nf4": NF4, "fp4": FP4}
"""Word -> what the sixteen places stand for."""


@dataclass(frozen=True)
class Form:
    """How the bytes of a weight lie that `quantize` packed.

    Attributes:
        book: a word of `BOOKS`.
        block: numbers that share a scale.
    """

    book: str
    block: int


NEST = 256
"""Magnitudes of blocks that share a scale, where they are quantized themselves."""

_PIECE = 2**18
"""Numbers that are handled at a time: what of them lies in memory fits a core's cache."""

_LONGEST = 1024
"""Numbers of a block that the compiled kernel is given: from 2,048 on it is known to err."""

_ENTRIES = 2**16
"""Of the table by which magnitudes are rounded; see `compress`."""


def quantize(weight: Tensor, book: str, block: int) -> tuple[Tensor, Tensor]:
    """A weight in four bits.

    Semantics: place of the nearest value to w * (1 / absmax), absmax = max |w| of the block in
    row-major order; the lower of two that are as near. The last block may be shorter.

    Args:
        weight: finite numbers of any shape.
        book: a word of `BOOKS`.
        block: numbers that share a scale; even.

    Returns:
        (ceil(n / 2), 1) uint8, and the magnitudes (ceil(n / block),) in float32.
    """
    flat = weight.detach().reshape(-1)
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-flat.numel() // block), dtype=torch.float32, device=flat.device)
    piece = _PIECE // block * block or block
    for start in range(0, flat.numel(), piece):
        part = flat[start : start + piece].float()
        places, scales = _places(part, book, block)
        absmax[start // block : start // block + len(scales)] = scales
        places = F.pad(places, (0, len(places) % 2), value=_zero(book))
        both = places[::2].bitwise_left_shift(4).bitwise_or_(places[1::2])
        packed[start // 2 : start // 2 + len(both), 0] = both
    return packed, absmax


def _places(flat: Tensor, book: str, block: int) -> tuple[Tensor, Tensor]:
    """Places (n,), uint8, and magnitudes of whole blocks and perhaps a shorter one at the end."""
    code, order = _code(book, flat.device)
    full = flat.numel() // block * block
    whole = flat[:full].view(-1, block)
    scales = whole.abs().amax(1)
    scaled = whole * (1.0 / scales.clamp(min=1e-38))[:, None]
    scaled = scaled.clamp_(-1, 1).view(-1)
    if full < flat.numel():  # divided, where whole blocks are multiplied by the inverse
        last = flat[full:].abs().max().clamp(min=1e-38)
        scales = torch.cat([scales, last[None]])
        scaled = torch.cat([scaled, (flat[full:] / last).clamp_(-1, 1)])
    return order.index_select(0, code.places(scaled)), scales


def dequantize(packed: Tensor, absmax: Tensor, book: str, block: int, out: Tensor) -> Tensor:
    """The numbers that a weight in four bits stands for.

    Semantics: out = value[place] * absmax[block], in float32, rounded once to the dtype of `out`.

    Args:
        packed, absmax: as `quantize` gives them; absmax in float32.
        out: contiguous, of the shape of the weight; it is written.
    """
    if _whole(packed, absmax, block, out) and (kernel := _tried(book, out.dtype)) is not None:
        kernel(packed, absmax, block, out)
        return out
    return _by_table(packed, absmax, book, block, out)


def _whole(packed: Tensor, absmax: Tensor, block: int, out: Tensor) -> bool:
    """Whether these are tensors in memory of the CPU, of whole blocks that are not very long, in
    the types that the compiled kernel reads.
    """
    if torch.compiler.is_compiling() or block > _LONGEST or out.numel() % block:
        return False
    if packed.element_size() > 1 or absmax.dtype != torch.float32:
        return False
    return all(type(t.data) is Tensor and t.is_cpu for t in (packed, absmax, out)) and all(
        t.is_contiguous() for t in (packed, absmax, out)
    )


@cache
def _tried(book: str, dtype: torch.dtype) -> Kernel | None:
    """The compiled kernel, if it makes of every byte the very bits that the table makes."""
    kernel = kernel_of(book, dtype)
    if kernel is None:
        return None
    packed = torch.arange(256, dtype=torch.uint8, device="cpu")
    absmax = torch.linspace(0.01, 3, 512 // 64, dtype=torch.float32, device="cpu")
    right, made = (torch.empty(512, dtype=dtype, device="cpu") for _ in range(2))
    _by_table(packed, absmax, book, 64, right)
    kernel(packed, absmax, 64, made)
    return kernel if torch.equal(right, made) else None


def _by_table(packed: Tensor, absmax: Tensor, book: str, block: int, out: Tensor) -> Tensor:
    flat, bytes_ = out.view(-1), packed.view(torch.uint8).view(-1)
    table = _pairs(book, out.device)
    piece = _PIECE // block * block or block
    whole = flat.numel() // piece * piece if flat.is_cpu else 0
    wide = flat if flat.dtype == torch.float32 else None
    held = (
        torch.empty(piece, dtype=torch.float32, device=out.device)
        if wide is None and whole
        else None
    )
    places = torch.empty(piece // 2, dtype=torch.int32, device=out.device) if whole else None
    for start in range(0, whole, piece):
        part = wide[start : start + piece] if wide is not None else held
        assert part is not None and places is not None
        places.copy_(bytes_[start // 2 : (start + piece) // 2])
        torch.index_select(table, 0, places, out=part.view(torch.int64))
        part.view(-1, block).mul_(absmax[start // block : (start + piece) // block, None])
        if wide is None:
            flat[start : start + piece] = part
    if whole < flat.numel():
        rest = table.index_select(0, bytes_[whole // 2 :].int()).view(torch.float32)
        scales = absmax[whole // block :].repeat_interleave(block)
        number = flat.numel() - whole
        flat[whole:] = rest[:number].mul_(scales[:number])
    return out


def compress(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes of blocks in 8 bits each.

    Semantics: places in the signed dynamic map of absmax - mean, in blocks of 256 by their largest
    magnitude, as the CPU kernel of bitsandbytes rounds them: x in [-1, 1] is first rounded to one
    of 65,536 equal steps, so that numbers within a step of a border may go to the farther side. Its
    CUDA kernel does not, so in a few of a thousand scales it differs by one place. The mean is
    summed in parts that torch does not share among threads, or the bytes would depend on how many
    there are, as those of bitsandbytes do in layers of two million numbers and more.

    Returns:
        places (n,) uint8, their magnitudes (ceil(n / 256),) float32, and the mean, float32.
    """
    parts = absmax.cpu().split(2**14)
    offset = (torch.stack([part.sum() for part in parts]).sum() / absmax.numel()).to(absmax.device)
    blocks = F.pad(absmax - offset, (0, -absmax.numel() % NEST)).view(-1, NEST)
    scales = blocks.abs().amax(1)
    scaled = torch.where(scales[:, None] > 0, blocks * (1 / scales)[:, None], -1)
    steps = ((scaled + 1) * ((_ENTRIES - 1) / 2) + 0.5).floor().clamp(0, _ENTRIES - 1).int()
    places = _rounded(absmax.device).index_select(0, steps.view(-1))
    return places[: absmax.numel()], scales, offset


def expand(places: Tensor, scales: Tensor, offset: Tensor) -> Tensor:
    """The magnitudes (n,), float32, that `compress` stored."""
    values = _signed(places.device).values.index_select(0, places.int())
    whole = values if len(values) % NEST == 0 else F.pad(values, (0, -len(values) % NEST))
    whole.view(-1, NEST).mul_(scales[:, None])
    return whole.add_(offset)[: len(values)]


def nested_map(device: torch.device) -> Tensor:
    """The 256 values of the signed dynamic map."""
    return _signed(device).values


@cache
def book_values(book: str, device: torch.device) -> Tensor:
    """The sixteen values (16,), float32."""
    return torch.tensor(BOOKS[book], dtype=torch.float32, device=device)


@cache
def _code(book: str, device: torch.device) -> tuple[Code, Tensor]:
    """The values in ascending order, and the place of each."""
    values = torch.tensor(BOOKS[book], dtype=torch.float32)
    order = torch.argsort(values)
    return code_of(values[order]).to(device), order.to(torch.uint8).to(device)


@cache
def _zero(book: str) -> int:
    """The place of 0, which fills up the last byte."""
    return int(_places(torch.zeros(2, dtype=torch.float32), book, 2)[0][0])


@cache
def _pairs(book: str, device: torch.device) -> Tensor:
    """Byte -> its two numbers in float32, seen as one integer of 64 bits: so they move at once."""
    bytes_ = torch.arange(256)
    both = torch.tensor(BOOKS[book], dtype=torch.float32)[
        torch.stack([bytes_ >> 4, bytes_ & 15], 1)
    ]
    return both.view(torch.int64).view(-1).to(device)


@cache
def _signed(device: torch.device) -> Code:
    return dynamic_code(signed=True).to(device)


@cache
def _rounded(device: torch.device) -> Tensor:
    """Step of [-1, 1] -> the nearest place of the signed dynamic map."""
    steps = torch.arange(_ENTRIES, dtype=torch.float32) / ((_ENTRIES - 1) / 2) - 1
    return _signed(torch.device("cpu")).places(steps).to(torch.uint8).to(device)
