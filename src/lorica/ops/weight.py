"""Add what a layer would compute with another weight: for updates that are a whole matrix.

Legend: I in features, O out features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F


def apply_linear(x: Tensor, y: Tensor, weight_OI: Tensor) -> Tensor:
    """Semantics: y + x @ weight_OI.T

    Args:
        x: (..., I); y: (..., O), in whose dtype is computed.
    """
    return y + F.linear(x.to(y.dtype), weight_OI)


def apply_embedding(ids: Tensor, y: Tensor, weight_VO: Tensor, scale: float) -> Tensor:
    """Semantics: y + weight_VO[ids] * scale"""
    return y + F.embedding(ids, weight_VO) * scale


def apply_conv(x: Tensor, y: Tensor, weight: Tensor, geometry: dict[str, Any]) -> Tensor:
    """Semantics: y + conv(x, weight, **geometry)

    Args:
        x: (batch, channels, ...) or unbatched. weight: (O, I / groups, *kernel).
        geometry: stride, padding, dilation, groups, padding_mode and the padding of that mode.
    """
    convolve = {3: F.conv1d, 4: F.conv2d}[weight.dim()]
    x, padding = padded(x.to(y.dtype), geometry)
    how = {name: geometry[name] for name in ("stride", "dilation", "groups")}
    return y + convolve(x, weight, padding=padding, **how)


def padded(x: Tensor, geometry: dict[str, Any]) -> tuple[Tensor, Any]:
    """The input of a convolution, padded where its mode is not zeros; what is left to pad."""
    if geometry["padding_mode"] == "zeros":
        return x, geometry["padding"]
    return F.pad(x, geometry["padding_amounts"], mode=geometry["padding_mode"]), 0
