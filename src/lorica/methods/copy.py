"""A trainable copy of a layer's own parameters, of all or of some by name.

This is how a new head (`modules_to_save`) is trained, and every selection of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorica.methods.method import Layer, Tensors


@dataclass(frozen=True)
class Copy:
    """Train a copy of the layer's parameters; the base's own stay as they are.

    Attributes:
        only: names of the parameters that are copied; None for all of them.
        tied_to: the place whose copy this is too, where both layers share all of these.
        fresh: whether the copy begins anew, as `attach.fresh` has it, rather than from the base.
    """

    only: tuple[str, ...] | None = None
    tied_to: str | None = None
    fresh: bool = False

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
        missing = set(self.only or ()) - set(layer.parameters())
        return [f"there is no parameter {name} to copy" for name in sorted(missing)]

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        own = layer.parameters()
        return own if self.only is None else {name: own[name] for name in self.only}

    def apply(self, x: Tensor, y: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        return y  # the site has already run the layer with the copied parameters

    def merged(self, weight: Tensor, tensors: Tensors, layer: Layer) -> Tensor | None:
        return tensors["weight"].to(weight.dtype) if "weight" in tensors else None
