"""Methods that are a change of the weight, W' = W + D(tensors): one place for all kinds of layers.

Such a method sees every layer as a matrix (rows of outputs, columns of inputs) or, for experts, a
stack of them, and says how the matrix of its update is made. What the layer does with a weight
(multiply, look up, convolve) is done here. Methods with a cheaper way to apply it have their own
`apply`.

Legend: I in features, O out features, E experts, V vocabulary, K size of a kernel.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.methods.method import Layer, Tensors
from lorica.methods.placed import Placed
from lorica.ops.weight import apply_conv, apply_embedding, apply_linear

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class WeightUpdate(Placed):
    """A method given by the matrix of its update."""

    @abstractmethod
    def matrix(self, tensors: Tensors, layer: Layer) -> Tensor:
        """The update as a matrix of `matrix_shape(layer)`."""

    def problems(self, layer: Layer) -> list[str]:
        if layer.kind in ("other", "block", "model"):
            return [f"{self.kind} needs a linear, embedding, convolution or experts layer"]
        smallest, r = min(matrix_shape(layer)[-2:]), getattr(self, "r", 1)
        if r > smallest:
            return [f"r={r} is more than the layer's own rank of at most {smallest}"]
        return []

    def delta(self, tensors: Tensors, layer: Layer) -> Tensor:
        """The update in the shape of `Layer.weight`."""
        return from_matrix(self.matrix(tensors, layer), layer)

    def apply(self, x: Tensor, y: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        update = self.delta(tensors, layer).to(y.dtype)
        if layer.kind == "linear":
            return apply_linear(x, y, update)
        if layer.kind == "embedding":
            return apply_embedding(x, y, update, layer.output_scale)
        return apply_conv(x, y, update, layer.geometry)

    def merged(self, weight: Tensor, tensors: Tensors, layer: Layer) -> Tensor | None:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        tensors = {name: tensor.detach().to(wide) for name, tensor in tensors.items()}
        return (weight.to(wide) + self.delta(tensors, layer)).to(weight.dtype)


def matrix_shape(layer: Layer) -> Shape:
    """(O, I), convolution (O, I / groups * K), embedding (width, V), experts (E, O, I)."""
    if layer.kind == "embedding":
        return layer.out_features, layer.in_features
    columns = layer.in_features // layer.geometry.get("groups", 1) * math.prod(layer.kernel_size)
    lead = (layer.num_experts,) if layer.num_experts else ()
    return (*lead, layer.out_features, columns)


def as_matrix(weight: Tensor, layer: Layer) -> Tensor:
    """A weight in the layout of `Layer.weight`, seen as the matrix; a view."""
    if layer.kind == "embedding":
        return weight.t()
    return weight.flatten(1) if layer.kernel_size else weight


def from_matrix(matrix: Tensor, layer: Layer) -> Tensor:
    """The inverse of `as_matrix`."""
    if layer.kind == "embedding":
        return matrix.t()
    return matrix.unflatten(-1, (-1, *layer.kernel_size)) if layer.kernel_size else matrix


def uniform(shape: Shape, fan_in: int, generator: torch.Generator) -> Tensor:
    """Uniform within 1 / sqrt(fan in): Kaiming's rule with slope sqrt(5)."""
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)
