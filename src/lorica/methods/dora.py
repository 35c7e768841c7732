"""DoRA: the direction of every output's weights is adapted by LoRA, their length by a number.

    W' = m / |W + s B A| (W + s B A)        |.| over the inputs of each output

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353), equation 5; the
norm is a constant to the gradient, section 4.3.

W + s B A is never made. With w the rows of W, b those of B,

    |w + s b A|^2 = |w|^2 + 2 s b (A w^T) + s^2 b (A A^T) b^T

needs the product of W with the thin A and the lengths of W's rows only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lorica.methods.lora import LoRA
from lorica.methods.method import Layer, Tensors, setting
from lorica.methods.update import as_matrix, from_matrix

_NORMS = WeakTensorKeyDictionary()
"""B of an adapter -> the state of everything that the norm depends on, and the norm."""


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA's settings; `m` is a tensor (O,), of an embedding (width,), of experts (E, O).

    Dropout acts on the low-rank product alone; PEFT drops from the base's product as well, which
    costs another product with W.
    """

    dora_detach_norm: bool = setting(
        True, "the norm is a constant to the gradient, as in the paper; false: it is not"
    )

    kind: ClassVar[str] = "dora"
    title: ClassVar[str] = "LoRA, the length of an output's weights apart (arXiv 2402.09353)"
    stacks: ClassVar[bool] = False

    def problems(self, layer: Layer) -> list[str]:
        found = super().problems(layer)
        if self.init_lora_weights == "random":
            found.append("init_lora_weights=random does not go with dora")
        if layer.geometry.get("groups", 1) > 1:
            found.append("the update of a grouped convolution has no length per output")
        return found

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        tensors = super().start(layer, generator)
        return {**tensors, "m": self._norm(tensors, layer)}

    def apply(self, x: Tensor, y: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        lengths = (tensors["m"] / self._norm(tensors, layer)).to(y.dtype)
        bias = layer.bias_values()
        if layer.kernel_size:  # channels first
            ones = [1] * len(layer.kernel_size)
            lengths = lengths.view(-1, *ones)
            bias = None if bias is None else bias.view(-1, *ones)
        zero = y.new_zeros(()).expand_as(y)
        product = super().apply(x, zero, tensors, layer)
        plain = y if bias is None else y - bias.to(y.dtype)
        return y + (lengths - 1) * plain + lengths * product

    def delta(self, tensors: Tensors, layer: Layer) -> Tensor:
        matrix = as_matrix(layer.stored().to(tensors["B"].dtype), layer)
        update = as_matrix(super().delta(tensors, layer), layer)
        lengths = (tensors["m"] / self._norm(tensors, layer)).unsqueeze(-1)
        return from_matrix((lengths - 1) * matrix + lengths * update, layer)

    def _start_problems(self) -> list[str]:
        found = super()._start_problems()
        if self.subtracts:
            found.append(f"init_lora_weights={self.init_lora_weights} does not go with dora")
        return found

    def _norm(self, tensors: Tensors, layer: Layer) -> Tensor:
        """|W + s B A| of every output; kept as long as nothing that it depends on changes.

        A pass with gradients computes it and forgets what was kept: a step may follow, and a fused
        optimizer does not count its writes in a tensor's version.
        """
        A, B = tensors["A"], tensors["B"]
        if torch.is_grad_enabled():
            _NORMS.pop(B, None)
            with torch.set_grad_enabled(not self.dora_detach_norm):
                return _norm(as_matrix(layer.stored(), layer), *_thin(A, B, layer), self.scale)
        state = (A.untyped_storage()._cdata, A._version, B._version, *layer.state())
        known = _NORMS.get(B)
        if known is None or known[0] != state:
            with torch.no_grad():
                norm = _norm(as_matrix(layer.stored(), layer), *_thin(A, B, layer), self.scale)
            known = _NORMS[B] = state, norm
        return known[1]


def _thin(A: Tensor, B: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """The factors as matrices, of experts as stacks of them."""
    return (A.flatten(1), B.flatten(1)) if layer.kernel_size else (A, B)


def _norm(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W (..., O, I), A (..., R, I), B (..., O, R) -> (..., O). In the dtype of B."""
    W = W.to(B.dtype)
    squares = W.square().sum(-1)
    cross = ((W @ A.mT) * B).sum(-1)
    own = ((B @ (A @ A.mT)) * B).sum(-1)
    return (squares + 2 * scale * cross + scale**2 * own).clamp_min(1e-24).sqrt()
