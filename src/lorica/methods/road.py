"""RoAd: the outputs of a layer are taken in pairs, and every pair is turned and stretched.

    y_i' = a_i cos(t_i) y_i - a_i sin(t_i) y_j        i, j: a pair of outputs, bias included
    y_j' = a_j sin(t_j) y_i + a_j cos(t_j) y_j

Liao and Monz 2024, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
Composability" (arXiv 2409.00119), equations 2 to 4. The pairs are the first and the second half of
every group of outputs, as in PEFT; which they are does not matter for what can be learnt.

Legend: O out features, G group size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from lorica.methods.method import Layer, Tensors, setting
from lorica.methods.placed import Placed

LARGEST = 64
"""The size of groups where all outputs divide by it, as in PEFT."""
_PER_OUTPUT = {"road_1": 0.5, "road_2": 1, "road_4": 2}
"""Angles per output, and as many scales."""


@dataclass(frozen=True)
class RoAd(Placed):
    """Settings and arithmetic of RoAd; `theta` are the angles, `alpha` the scales."""

    variant: Literal["road_1", "road_2", "road_4"] = setting(
        "road_1", "angles are shared by a pair (road_1), by a row of its matrix (road_2), or not"
    )
    group_size: int | None = setting(
        None,
        "outputs are paired within groups of this size, half with half; null: 64, or the largest "
        "below it that divides the outputs of all layers",
    )

    kind: ClassVar[str] = "road"
    title: ClassVar[str] = "pairs of outputs turned and stretched (arXiv 2409.00119)"

    @property
    def size(self) -> int:
        """The outputs of one group."""
        return LARGEST if self.group_size is None else self.group_size

    def over(self, layers: Sequence[Layer]) -> Self:
        if self.group_size is not None:
            return self
        common = math.gcd(*(layer.out_features for layer in layers))
        sizes = (n for n in range(LARGEST, 1, -2) if common % n == 0)
        return replace(self, group_size=next(sizes, LARGEST))

    def decided(self, given: Self) -> str:
        """What `over` has decided that was not `given`; empty for the usual."""
        if given.group_size is not None or self.size == LARGEST:
            return ""
        return f"group_size: {self.size}, the largest below {LARGEST} that divides all outputs"

    def problems(self, layer: Layer) -> list[str]:
        if layer.kind not in ("linear", "embedding", "conv1d", "conv2d"):
            return ["road needs a linear, embedding or convolution layer"]
        if layer.out_features % self.size:
            fits = math.gcd(layer.out_features, self.size)
            hint = f"; {fits} fits" if fits % 2 == 0 else ""
            return [
                f"its {layer.out_features} outputs are no multiple of group_size={self.size}{hint}"
            ]
        return []

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        size = int(layer.out_features * _PER_OUTPUT[self.variant])
        return {"theta": torch.zeros(size), "alpha": torch.ones(size)}

    def apply(self, x: Tensor, y: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        return self._turned(y, tensors, -1 - len(layer.kernel_size))

    def merged(self, weight: Tensor, tensors: Tensors, layer: Layer) -> Tensor | None:
        if layer.geometry.get("groups", 1) > 1:
            return None  # a pair may lie in two groups, which see different inputs
        return self._turned(weight, _constants(tensors), -1 if layer.kind == "embedding" else 0)

    def merged_bias(self, bias: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        """The adapted bias in the dtype of `bias`: it is turned with the outputs."""
        return self._turned(bias, _constants(tensors), -1)

    def _turned(self, y: Tensor, tensors: Tensors, outputs: int) -> Tensor:
        """The pairs along the dimension `outputs`, turned; in the dtype of `y`."""
        cosine, sine = self._columns(tensors)
        wide = y.movedim(outputs, -1).to(torch.promote_types(y.dtype, cosine.dtype))
        first, second = wide.unflatten(-1, (-1, 2, self.size // 2)).unbind(-2)
        across = torch.stack((-second, first), -2).flatten(-3)
        return (wide * cosine + across * sine).to(y.dtype).movedim(-1, outputs)

    def _columns(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """What multiplies an output itself, and what its partner: two of (O,)."""
        theta, alpha = tensors["theta"], tensors["alpha"]
        if self.variant == "road_4":
            angles, scales = (t.view(-1, 2, self.size).unbind(1) for t in (theta, alpha))
            cosine, sine = scales[0] * angles[0].cos(), scales[1] * angles[1].sin()
            return cosine.flatten(), sine.flatten()
        cosine, sine = alpha * theta.cos(), alpha * theta.sin()
        if self.variant == "road_2":
            return cosine, sine
        both = (t.view(-1, 1, self.size // 2).repeat(1, 2, 1) for t in (cosine, sine))
        cosine, sine = both
        return cosine.flatten(), sine.flatten()

    def _problems(self) -> list[str]:
        found = []
        if self.variant not in _PER_OUTPUT:
            found.append(f"variant is {self.variant!r}; there are {', '.join(_PER_OUTPUT)}")
        size: Any = self.size
        if isinstance(size, bool) or not isinstance(size, int) or size < 2 or size % 2:
            found.append(f"group_size is {size!r}; it must be an even number from 2")
        return found


def _constants(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().float() for name, tensor in tensors.items()}
