"""HiRA: the update is the weight itself, times a low-rank matrix, entry by entry.

    D = W * (B A)

Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language
Models" (ICLR 2025). The update has a high rank with the parameters of a low one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorica.methods.method import Layer, Tensors, numeric_problems, setting
from lorica.methods.placed import rank_problems
from lorica.methods.update import WeightUpdate, as_matrix, matrix_shape, uniform


@dataclass(frozen=True)
class HiRA(WeightUpdate):
    """Settings and arithmetic of HiRA."""

    r: int = setting(32, "rank of the factor of the weight")
    hira_dropout: float = setting(0.0, "share of a layer's input dropped, in training")

    kind: ClassVar[str] = "hira"
    title: ClassVar[str] = "the weight times a low-rank matrix, entry by entry (ICLR 2025)"

    @property
    def dropout(self) -> float:
        return self.hira_dropout

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        *lead, rows, columns = matrix_shape(layer)
        A, B = (*lead, self.r, columns), (*lead, rows, self.r)
        return {"A": uniform(A, columns, generator), "B": torch.zeros(B)}

    def matrix(self, tensors: Tensors, layer: Layer) -> Tensor:
        product = tensors["B"] @ tensors["A"]
        return as_matrix(layer.stored().to(product.dtype), layer) * product

    def _problems(self) -> list[str]:
        ranges: dict[str, Any] = {"hira_dropout": (0.0, 0.99)}
        return [*rank_problems("r", self.r), *numeric_problems(self, ranges)]
