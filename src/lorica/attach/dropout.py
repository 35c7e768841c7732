"""Dropout in front of adapters: its mask depends on the seed of the step and the place alone.

So a resumed run and a recomputed layer draw the same mask.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.attach.plates import Plates


def drop(x: Tensor, share: float, plates: Plates) -> Tensor:
    """The input of an adapter in training. Token ids are left as they are."""
    if not share or not x.is_floating_point():
        return x
    seed = plates.route.dropout_seed if plates.route is not None else None
    if seed is None:
        return F.dropout(x, share)
    return x * drawn_mask(x.shape, share, plates, seed, x.device).to(x.dtype) / (1 - share)


def drawn_mask(
    shape: torch.Size, share: float, plates: Plates, seed: int | None, device: torch.device
) -> Tensor:
    """What dropout keeps: drawn from the seed of the step and the place, or from torch's state."""
    if seed is None:
        return torch.rand(shape, device=device) >= share
    digest = hashlib.sha256(f"{seed}/{plates.path}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(shape, generator=generator, device=device) >= share
