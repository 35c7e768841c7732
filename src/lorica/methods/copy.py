"""A full trainable copy of a layer's parameters: how a new head (`modules_to_save`) is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.methods.method import Layer, Tensors


@dataclass(frozen=True)
class Copy:
    """Train a copy of every parameter of the layer; the base's own stay as they are."""

    kind: ClassVar[str] = "copy"
    replaces: ClassVar[bool] = True
    stacks: ClassVar[bool] = False
    frozen: ClassVar[frozenset[str]] = frozenset()

    @property
    def dropout(self) -> float:
        return 0.0

    def at(self, path: str) -> Copy:
        return self

    def problems(self, layer: Layer) -> list[str]:
        return []

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        return layer.parameters()

    def apply(self, x: Tensor, y: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        return y  # the site has already run the layer with the copied parameters

    def merged(self, weight: Tensor, tensors: Tensors, layer: Layer) -> Tensor | None:
        return tensors["weight"].to(weight.dtype) if "weight" in tensors else None
