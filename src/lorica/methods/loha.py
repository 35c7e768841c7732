"""LoHa: the update is the entry-by-entry product of two low-rank matrices.

    D = s (W1a W1b) * (W2a W2b)        s = lora_alpha / r

Hyeon-Woo et al. 2021, "FedPara" (arXiv 2108.06098), proposition 1: with factors of rank r the
update reaches rank r^2. Known as LoHa from LyCORIS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.methods.method import Layer, Tensors, setting
from lorica.methods.placed import rank_problems, scale_problems
from lorica.methods.update import WeightUpdate, matrix_shape, uniform


@dataclass(frozen=True)
class LoHa(WeightUpdate):
    """Settings and arithmetic of LoHa."""

    r: int = setting(8, "rank of each of the two factors")
    lora_alpha: float = setting(16, "the update is scaled by lora_alpha / r")

    kind: ClassVar[str] = "loha"
    title: ClassVar[str] = "two low-rank matrices multiplied by entries (arXiv 2108.06098)"

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        *lead, rows, columns = matrix_shape(layer)
        tall, wide = (*lead, rows, self.r), (*lead, self.r, columns)
        return {
            "w1_a": uniform(tall, self.r, generator),
            "w1_b": uniform(wide, columns, generator),
            "w2_a": uniform(tall, self.r, generator),
            "w2_b": torch.zeros(wide),
        }

    def matrix(self, tensors: Tensors, layer: Layer) -> Tensor:
        one = tensors["w1_a"] @ tensors["w1_b"]
        two = tensors["w2_a"] @ tensors["w2_b"]
        return one * two * (self.lora_alpha / self.r)

    def _problems(self) -> list[str]:
        return [*rank_problems("r", self.r), *scale_problems("lora_alpha", self.lora_alpha)]
