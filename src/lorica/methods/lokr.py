"""LoKr: the update is a Kronecker product of a small matrix and a larger one, which may be thin.

    D = s W1 (x) W2        W2 = W2a W2b where r is small; s = lora_alpha / r

Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
Evaluation" (arXiv 2309.14859), section 3.

Legend: O = Oa Ob rows, I = Ia Ib columns of the update; W1 (Oa, Ia), W2 (Ob, Ib).
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
class LoKr(WeightUpdate):
    """Settings and arithmetic of LoKr."""

    r: int = setting(8, "rank of the large factor; it is whole where that is not smaller")
    lora_alpha: float = setting(16, "the update is scaled by lora_alpha / r")
    decompose_both: bool = setting(False, "the small factor may be a thin product too")
    decompose_factor: int = setting(
        -1, "size of the small factor; -1: as near to the root of the layer's as divides it"
    )

    kind: ClassVar[str] = "lokr"
    title: ClassVar[str] = "a Kronecker product of two small matrices (arXiv 2309.14859)"

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        *lead, rows, columns = matrix_shape(layer)
        channels = columns
        for size in layer.kernel_size:
            channels //= size
        kernel = columns // channels
        out_a, out_b = factors(rows, self.decompose_factor)
        in_a, in_b = factors(channels, self.decompose_factor)
        found: Tensors = {}
        if self.decompose_both and self.r < max(out_a, in_a) / 2:
            found["w1_a"] = torch.zeros(*lead, out_a, self.r)
            found["w1_b"] = uniform((*lead, self.r, in_a), in_a, generator)
        else:
            found["w1"] = torch.zeros(*lead, out_a, in_a)
        if self.r < max(out_b, in_b) / 2:
            found["w2_a"] = uniform((*lead, out_b, self.r), self.r, generator)
            found["w2_b"] = uniform((*lead, self.r, in_b * kernel), in_b * kernel, generator)
        else:
            found["w2"] = uniform((*lead, out_b, in_b * kernel), in_b * kernel, generator)
        return found

    def matrix(self, tensors: Tensors, layer: Layer) -> Tensor:
        w1, w2 = _whole(tensors, "w1"), _whole(tensors, "w2")
        product = w1[..., :, None, :, None] * w2[..., None, :, None, :]  # (Oa, Ob, Ia, Ib)
        *lead, a, b, c, d = product.shape
        return product.reshape(*lead, a * b, c * d) * (self.lora_alpha / self.r)

    def _problems(self) -> list[str]:
        found = [*rank_problems("r", self.r), *scale_problems("lora_alpha", self.lora_alpha)]
        given = self.decompose_factor
        if isinstance(given, bool) or not isinstance(given, int) or not (given == -1 or given > 0):
            found.append(f"decompose_factor is {given!r}; it must be -1 or more than 0")
        return found


def _whole(tensors: Tensors, name: str) -> Tensor:
    return tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]


def factors(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `size`, the smaller one first.

    The smaller is `factor` where that divides, else the largest divisor that is at most `factor`
    (or any, for -1) and at most the root of `size`.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = max(d for d in range(1, int(size**0.5) + 1) if size % d == 0 and d <= limit)
    return small, size // small
