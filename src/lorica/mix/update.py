"""What an adapter does at a place, as a sum of thin products where it is one, else as a matrix.

Legend: O rows (outputs), K columns (inputs, of a convolution with its kernel), R rank; before them
the experts of a layer that has some. The matrix is that of `methods.update.matrix_shape`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorica.attach.plates import Slot
from lorica.methods.lora import LoRA
from lorica.methods.method import Layer
from lorica.methods.update import as_matrix


@dataclass(frozen=True, eq=False)
class Update:
    """A change of a weight.

    Attributes:
        A, B: factors (.., R, K) and (.., O, R), where it is their product.
        dense: the matrix (.., O, K) otherwise.
        scale: multiplies either.
    """

    A: Tensor | None
    B: Tensor | None
    dense: Tensor | None
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        """Of the factors; None where there are none."""
        return None if self.A is None else self.A.shape[-2]

    def matrix(self) -> Tensor:
        """(.., O, K) in float64."""
        if self.dense is not None:
            return self.dense.double() * self.scale
        assert self.A is not None and self.B is not None
        return (self.B.double() @ self.A.double()) * self.scale

    def times(self, weight: float) -> Update:
        """This update, so many times."""
        return Update(self.A, self.B, self.dense, self.scale * weight)

    def dot(self, other: Update) -> float:
        """The sum over all elements of the product of both. Of thin products it is
        tr((B1^T B2) (A2 A1^T)), so no matrix is formed.
        """
        if self.A is None or self.B is None or other.A is None or other.B is None:
            return float((self.matrix() * other.matrix()).sum())
        inner = self.B.double().mT @ other.B.double()
        outer = self.A.double() @ other.A.double().mT
        return float((inner * outer).sum()) * self.scale * other.scale

    def norm(self) -> float:
        """Of Frobenius."""
        return max(self.dot(self), 0.0) ** 0.5


def total(parts: list[Update]) -> Update:
    """The sum: of thin products the product of stacked factors, the scales in A."""
    if len(parts) == 1:
        return parts[0]
    if all(part.A is not None for part in parts):
        A = torch.cat([part.A * part.scale for part in parts if part.A is not None], dim=-2)
        B = torch.cat([part.B for part in parts if part.B is not None], dim=-1)
        return Update(A, B, None)
    return Update(None, None, torch.stack([part.matrix() for part in parts]).sum(0))


def distance(one: Update, other: Update) -> float:
    """The norm of the difference."""
    return total([one, other.times(-1.0)]).norm()


def update_of(slot: Slot, layer: Layer) -> Update | str:
    """What a slot does, in float32 or wider; or why that is no change of a weight."""
    method: Any = slot.method
    tensors = {key: tensor.detach() for key, tensor in slot.tensors.items()}
    if hasattr(method, "merged_bias") and layer.bias:
        return f"{method.kind} changes the bias as well, which no LoRA does"
    if layer.geometry.get("groups", 1) > 1:
        return "the update of a grouped convolution is no grouped convolution itself"
    if isinstance(method, LoRA) and method.stacks:
        A, B = method.factors(tensors, experts=layer.kind == "experts")
        if layer.kernel_size:
            A, B = A.flatten(1), B.flatten(1)
        return Update(A, B, None, method.scale)
    if method.stacks and layer.kind == "linear":
        segment = method.segment(tensors)
        return Update(segment.A_RI, segment.B_OR, None, segment.scale)
    if hasattr(method, "delta"):
        return Update(None, None, as_matrix(method.delta(tensors, layer), layer).detach())
    return f"{method.kind} is no change of a weight"


def to_tensors(update: Update, layer: Layer) -> dict[str, Tensor]:
    """The factors as LoRA holds them, the scale in A. Only of an update that has factors."""
    assert update.A is not None and update.B is not None
    A, B = (update.A * update.scale).float(), update.B.float()
    if layer.kernel_size:
        A = A.unflatten(-1, (-1, *layer.kernel_size))
        B = B.reshape(*B.shape, *(1 for _ in layer.kernel_size))
    return {"A": A.contiguous().clone(), "B": B.contiguous().clone()}
