"""The joint between a storage and everything else: what a quantizer must be able to do.

A quantizer is a frozen dataclass: its fields are how it stores, and it never sees a module, an
adapter or a method. QUANTIZERS in `base.quantize` has them by word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lorica.ops.four_bit import Form

Stored = dict[str, Tensor]
"""What is stored of one weight: "weight", and whatever else belongs to it."""


class Quantizer(Protocol):
    """One way to store a matrix (out, in) in fewer bytes. Implementations are final."""

    word: ClassVar[str]
    """What it is called on the command line and in files."""

    def settings(self) -> str:
        """How it stores, in one line: two that store alike say the same."""
        ...

    def problems(self, shape: tuple[int, ...]) -> list[str]:
        """Why a matrix of this shape cannot be stored so; empty when it can."""
        ...

    def empty(self, shape: tuple[int, ...], device: torch.device) -> Stored:
        """Tensors of the sizes that `pack` would give, with any numbers."""
        ...

    def pack(self, weight: Tensor) -> Stored:
        """A finite matrix in floating point, stored."""
        ...

    def unpack(self, stored: Mapping[str, Tensor], out: Tensor) -> None:
        """Write the numbers into `out`, which has the matrix' shape and any floating dtype."""
        ...

    def form(self) -> Form | None:
        """How the bytes lie, where a kernel reads them by itself."""
        ...

    def entries(self, stored: Stored, shape: tuple[int, ...], dtype: torch.dtype) -> Stored:
        """The tensors of a state dict by their name behind the module's path: the weight is that
        of another library's layer, where one stores so.
        """
        ...

    def read(self, entries: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
        """The inverse of `entries`. Raises BaseModelError, naming what does not fit."""
        ...
