"""Train the rows of some tokens in an embedding, and in every layer that shares its weight.

    W'[i] = rows[i]        for the chosen tokens i; all other rows stay the base's

This is how the tokens that were added to a vocabulary are learnt (`trainable_token_indices` of
LoRA). The rows themselves are kept, as in PEFT: what a fresh embedding holds there is arbitrary.

Legend: N chosen tokens, V vocabulary, D width of the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.methods.method import Layer, Tensors


@dataclass(frozen=True)
class Tokens:
    """Its tensors are `rows` (N, D) and `indices` (N,).

    Attributes:
        indices: the tokens, ascending.
        tied_to: the place whose tensors this one shares, where both layers share one weight.
    """

    indices: tuple[int, ...]
    tied_to: str | None = None

    kind: ClassVar[str] = "tokens"
    replaces: ClassVar[bool] = False
    stacks: ClassVar[bool] = False
    frozen: ClassVar[frozenset[str]] = frozenset({"indices"})

    @property
    def dropout(self) -> float:
        return 0.0

    def at(self, path: str) -> Tokens:
        return self

    def problems(self, layer: Layer) -> list[str]:
        if layer.kind not in ("embedding", "linear"):
            return ["tokens are rows of an embedding, or of an output layer"]
        size = layer.in_features if layer.kind == "embedding" else layer.out_features
        beyond = [i for i in self.indices if i >= size]
        return [f"token {i} is beyond its vocabulary of {size:,}" for i in beyond[:3]]

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        indices = torch.tensor(self.indices)
        rows = layer.stored()[indices.to(layer.stored().device)].float()
        return {"rows": rows.clone(), "indices": indices}

    def apply(self, x: Tensor, y: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        shift, indices = _shift(tensors, layer).to(y.dtype), tensors["indices"]
        if layer.kind == "linear":
            return y.index_add(-1, indices, F.linear(x.to(y.dtype), shift))
        place = torch.searchsorted(indices, x).clamp_max(len(indices) - 1)
        chosen = (indices[place] == x).unsqueeze(-1)
        return torch.where(chosen, y + F.embedding(place, shift) * layer.output_scale, y)

    def delta(self, tensors: Tensors, layer: Layer) -> Tensor:
        """The update as a weight, (V, D)."""
        shift = _shift(tensors, layer)
        zero = shift.new_zeros(layer.stored().shape)
        return zero.index_add(0, tensors["indices"].long(), shift)

    def merged(self, weight: Tensor, tensors: Tensors, layer: Layer) -> Tensor | None:
        rows = tensors["rows"].detach().to(weight.dtype)
        return weight.index_copy(0, tensors["indices"].long(), rows)


def _shift(tensors: Tensors, layer: Layer) -> Tensor:
    """What is added to the chosen rows, (N, D): exactly zero at the start."""
    rows = tensors["rows"]
    return rows - layer.stored()[tensors["indices"].long()].to(rows.dtype)
