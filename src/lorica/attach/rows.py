"""The weight of each row of a batch, shaped for what one layer is given."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from lorica.attach.plates import Plates
from lorica.errors import ActivationError

_ROUTED = re.compile(r"(^|\.)experts\.\d+\.")  # is given some of the tokens, of any row


def row_gate(plates: Plates, gate: Tensor, like: Tensor) -> Tensor:
    """(N,) or (rows, N) shaped so that it broadcasts against `like`, (batch, ..., features).

    Beams and returned sequences repeat every row in place, so a batch of a multiple of the rows is
    served. Some models lay all tokens of the batch in one dimension in the midst of a block (OPT,
    shared experts): these are known by their number, which is that of the layer before.
    """
    if gate.dim() == 1:
        return gate
    if plates.guided:
        gate = _twice(plates, gate, like)
    times, rest = divmod(like.shape[0], gate.shape[0])
    flat = like.dim() == 2
    if not torch.compiler.is_compiling():
        if not flat and plates.layer.kind == "linear":
            plates.status.tokens = like.shape[:-1].numel()
        flat = flat and like.shape[0] != plates.status.tokens
    batched = like.dim() >= 2 + len(plates.layer.kernel_size) and not _ROUTED.search(plates.path)
    if not batched or not times or rest or (times != 1 and flat):
        raise ActivationError(
            f"{plates.path}: {gate.shape[0]} rows are active, but this layer was given "
            f"{tuple(like.shape)}",
            expected="a batch with one entry of the activation per row",
        )
    gate = gate if times == 1 else gate.repeat_interleave(times, 0)
    ones = [1] * (like.dim() - 2)
    if plates.layer.kind in ("conv1d", "conv2d"):  # channels first
        return gate.view(-1, gate.shape[1], *ones)
    return gate.view(-1, *ones, gate.shape[1])


def _twice(plates: Plates, gate: Tensor, like: Tensor) -> Tensor:
    """One entry per picture for a denoiser: the same for its pass without the prompt, which come
    first, and for its pass with it (classifier-free guidance).
    """
    if like.shape[0] == 2 * gate.shape[0]:
        return torch.cat([gate, gate])
    if like.shape[0] != gate.shape[0]:
        raise ActivationError(
            f"{plates.path}: {gate.shape[0]} rows are active, but this layer was given "
            f"{tuple(like.shape)}",
            expected="one entry of the activation per picture; with guidance two rows per picture",
        )
    return gate
