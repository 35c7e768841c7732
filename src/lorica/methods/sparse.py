"""Train the entries of the weights that matter most for the task, and keep them as sparse updates.

    D = 0 but at k chosen entries        k = density of all entries of the chosen layers

Which entries is decided once, before training, from gradients on some records: Sung, Nair and
Raffel 2021, "Training Neural Networks with Fixed Sparse Masks" (FISH mask, arXiv 2111.09839), for
the empirical Fisher information; the other scores are in `train.importance`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from lorica.methods.method import Layer, Tensors, numeric_problems, setting
from lorica.methods.update import WeightUpdate, matrix_shape

SELECTIONS = ("fisher", "gradient", "gradient-weight", "gradient-input", "magnitude", "random")
GRANULARITIES = ("weight", "row", "head", "module", "layer")


@dataclass(frozen=True)
class Sparse(WeightUpdate):
    """Settings and arithmetic of a sparse update."""

    density: float = setting(0.005, "share of the entries of the chosen layers that train")
    selection: Literal[
        "fisher", "gradient", "gradient-weight", "gradient-input", "magnitude", "random"
    ] = setting(
        "fisher",
        "what decides: squared gradients (fisher), gradients, gradients times weights, gradients "
        "times inputs, the weights themselves, or chance",
    )
    granularity: Literal["weight", "row", "head", "module", "layer"] = setting(
        "weight",
        "what is chosen: single entries, rows (neurons), heads of attention, whole modules, or "
        "all of a layer of the model",
    )
    relevance_records: int = setting(128, "records whose gradients decide")
    count: int | None = setting(None, "entries at each place; null: as density says")

    kind: ClassVar[str] = "sparse"
    title: ClassVar[str] = "the most relevant entries of the weights (arXiv 2111.09839)"
    frozen: ClassVar[frozenset[str]] = frozenset({"indices"})

    @property
    def needs_records(self) -> bool:
        """Whether the choice depends on the task's records."""
        return self.selection in ("fisher", "gradient", "gradient-weight", "gradient-input")

    @property
    def needs_choice(self) -> bool:
        """Whether the entries are chosen over all layers together. Single ones by chance need no
        choice: `start` draws them.
        """
        return self.selection != "random" or self.granularity != "weight"

    @property
    def needs_gradients(self) -> bool:
        """Whether the choice sums up a gradient of every weight."""
        return self.needs_records

    @property
    def num_records(self) -> int:
        """How many of them."""
        return self.relevance_records

    def stand_in(self) -> Self:
        """Settings of about the same size of which nothing is chosen."""
        return replace(self, selection="random", granularity="weight")

    def sized(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """The settings at a place whose tensors have these shapes."""
        size = shapes.get("values", ())
        return replace(self, count=size[0]) if len(size) == 1 else self

    def problems(self, layer: Layer) -> list[str]:
        found = super().problems(layer)
        if not found and self.count is not None and self.count > math.prod(matrix_shape(layer)):
            found.append(f"it has fewer than {self.count} entries")
        return found

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        """Entries chosen by chance; `train.importance` gives chosen ones."""
        size = math.prod(matrix_shape(layer))
        k = max(1, round(self.density * size)) if self.count is None else self.count
        chosen = torch.randperm(size, generator=generator)[:k].sort().values
        return {"values": torch.zeros(k), "indices": chosen}

    def tensor_problems(self, tensors: Tensors, layer: Layer) -> list[str]:
        """What is wrong with tensors that were read from a file."""
        indices, size = tensors["indices"], math.prod(matrix_shape(layer))
        if indices.dtype != torch.int64:
            return [f"indices are {indices.dtype}, not int64"]
        inside = not indices.numel() or (indices.min() >= 0 and indices.max() < size)
        if not inside or not bool((indices.diff() > 0).all()):
            return [f"indices are not ascending numbers below {size}"]
        return []

    def matrix(self, tensors: Tensors, layer: Layer) -> Tensor:
        shape, values = matrix_shape(layer), tensors["values"]
        flat = values.new_zeros(math.prod(shape))
        return flat.index_put((tensors["indices"].long(),), values).view(shape)

    def _problems(self) -> list[str]:
        found = numeric_problems(self, {"density": (1e-9, 1.0), "relevance_records": (1, 10**6)})
        if self.selection not in SELECTIONS:
            found.append(f"selection is {self.selection!r}; there are {', '.join(SELECTIONS)}")
        if self.granularity not in GRANULARITIES:
            known = ", ".join(GRANULARITIES)
            found.append(f"granularity is {self.granularity!r}; there are {known}")
        k: Any = self.count
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 0):
            found.append(f"count is {k!r}; it must be a whole number")
        return found
