"""VeRA: one random, frozen pair of factors for all layers; each layer trains two vectors.

    D = diag(b) B diag(d) A        A (R, widest input), B (widest output, R), cut to the layer

Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation" (arXiv 2310.11454), equation 2.
The pair follows from `projection_prng_key` and the two largest widths, so it need not be saved.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.methods.method import Layer, Tensors, numeric_problems, setting, state
from lorica.methods.placed import rank_problems
from lorica.methods.update import WeightUpdate, matrix_shape

MAX_PROJECTION = 2**28
"""Numbers that the frozen pair may have: files come from strangers."""


@dataclass(frozen=True)
class VeRA(WeightUpdate):
    """Settings and arithmetic of VeRA."""

    r: int = setting(256, "rank of the frozen random pair")
    vera_dropout: float = setting(0.0, "share of a layer's input dropped, in training")
    d_initial: float = setting(0.1, "start of the vector between the factors")
    projection_prng_key: int = setting(0, "seed of the frozen random pair")
    widths: tuple[int, int] = state((0, 0))
    """The widest input and output of the adapted layers; 0: found when it is put on a model."""

    kind: ClassVar[str] = "vera"
    title: ClassVar[str] = "vectors around one frozen random product (arXiv 2310.11454)"

    @property
    def dropout(self) -> float:
        return self.vera_dropout

    def over(self, layers: Sequence[Layer]) -> Self:
        shapes = [matrix_shape(layer) for layer in layers]
        if not shapes or all(self.widths):
            return self
        return replace(self, widths=(max(s[-1] for s in shapes), max(s[-2] for s in shapes)))

    def problems(self, layer: Layer) -> list[str]:
        if layer.kind in ("other", "block", "model"):
            return super().problems(layer)
        found = []
        if all(self.widths):
            rows, columns = matrix_shape(layer)[-2:]
            if columns > self.widths[0] or rows > self.widths[1]:
                found.append(f"it is wider than widths={self.widths}")
        return found

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        *lead, rows, _ = matrix_shape(layer)
        return {
            "b": torch.zeros(*lead, rows),
            "d": torch.full((*lead, self.r), float(self.d_initial)),
        }

    def matrix(self, tensors: Tensors, layer: Layer) -> Tensor:
        A, B = self._pair(tensors["b"], layer)
        return tensors["b"].unsqueeze(-1) * (B @ (tensors["d"].unsqueeze(-1) * A))

    def apply(self, x: Tensor, y: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        if layer.kind != "linear":
            return super().apply(x, y, tensors, layer)
        A, B = self._pair(y, layer)
        b, d = tensors["b"].to(y.dtype), tensors["d"].to(y.dtype)
        return y + b * F.linear(d * F.linear(x.to(y.dtype), A), B)

    def _pair(self, like: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        widest_in, widest_out = self.widths if all(self.widths) else matrix_shape(layer)[:-3:-1]
        A, B = projection(self.projection_prng_key, self.r, widest_in, widest_out)
        rows, columns = matrix_shape(layer)[-2:]
        return A[:, :columns].to(like), B[:rows].to(like)

    def _problems(self) -> list[str]:
        ranges = {
            "vera_dropout": (0.0, 0.99),
            "d_initial": (-1e4, 1e4),
            "projection_prng_key": (0, 2**63 - 1),
        }
        found = [*rank_problems("r", self.r), *numeric_problems(self, ranges)]
        if not found and self.r * sum(self.widths) > MAX_PROJECTION:
            found.append(f"r={self.r} with widths={self.widths} needs a pair of over 2^28 numbers")
        return found


def projection(key: int, r: int, widest_in: int, widest_out: int) -> tuple[Tensor, Tensor]:
    """The frozen pair: A (r, widest_in), B (widest_out, r), as PEFT draws it from `key`."""
    if type(torch.empty(0)) is not Tensor:  # tensors without values are not for keeping
        return _draw(key, r, widest_in, widest_out)
    return _kept(key, r, widest_in, widest_out)


@functools.lru_cache(maxsize=4)
def _kept(key: int, r: int, widest_in: int, widest_out: int) -> tuple[Tensor, Tensor]:
    return _draw(key, r, widest_in, widest_out)


def _draw(key: int, r: int, widest_in: int, widest_out: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(key)
    A = torch.empty(r, widest_in).uniform_(
        -math.sqrt(6 / widest_in), math.sqrt(6 / widest_in), generator=generator
    )
    B = torch.empty(widest_out, r).uniform_(
        -math.sqrt(6 / r), math.sqrt(6 / r), generator=generator
    )
    return A, B
