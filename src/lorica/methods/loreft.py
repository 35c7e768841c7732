"""LoReFT: an edit of the hidden states behind each block, in a small subspace, at a few tokens.

    h + Rᵀ (W h + b - R h)        R (r, H) with orthonormal rows, W (r, H), b (r,)

Wu et al. 2024, "ReFT: Representation Finetuning for Language Models" (arXiv 2404.03592), equation
1, at the first p and the last s tokens of the prompt (section 3.3). What is generated is not
edited.

R is the orthonormal factor of a free matrix, made by a QR decomposition in every forward pass:
4 H r^2 operations for each block, to the 4 H r of every edited token, and on a GPU a few calls of a
solver for each block. W starts at R and b at 0, so that nothing is edited at first.

Legend: H width of the model, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.methods.method import Layer, Tensors, setting
from lorica.methods.placed import MethodSettings, rank_problems
from lorica.methods.virtual import count_problems


@dataclass(frozen=True, kw_only=True)
class LoReFT(MethodSettings):
    """Settings and arithmetic of LoReFT.

    Raises:
        ConfigError: a value is out of range; all problems at once.
    """

    r: int = setting(8, "rank: dimensions of the subspace that is edited")
    prefix_positions: int = setting(7, "edit so many of the first tokens of the prompt")
    suffix_positions: int = setting(7, "edit so many of the last tokens of the prompt")
    layers_to_transform: str | tuple[int, ...] | None = setting(
        None, "only these layers, by number: 0,3,5 or a range such as 0-3"
    )
    modules_to_save: str | tuple[str, ...] = setting(
        (), "modules trained whole beside the adapter, such as a new head"
    )

    kind: ClassVar[str] = "loreft"
    title: ClassVar[str] = "edits of hidden states at a few tokens (arXiv 2404.03592)"

    def problems(self, layer: Layer) -> list[str]:
        if layer.kind not in ("block", "model"):
            return [f"{self.kind} sits behind the blocks of a model"]
        if layer.kind == "block" and self.r > layer.in_features:
            return [f"r={self.r} is more than the width of the model"]
        return []

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        """Tensors for a block; none for the stack, which only says where its prompts are."""
        if layer.kind == "model":
            return {}
        free = torch.randn(layer.in_features, self.r, generator=generator)
        R = orthonormal(torch.linalg.qr(free).Q.t())
        return {"R": R, "W": orthonormal(R), "b": torch.zeros(self.r)}

    def intervene(self, y: Tensor, tensors: Tensors) -> Tensor:
        """What is added to the hidden states y (..., H), were all of them edited."""
        R = orthonormal(tensors["R"])
        W, b = tensors["W"] - R, tensors["b"]
        return F.linear(y, W.to(y.dtype), b.to(y.dtype)) @ R.to(y.dtype)

    def _problems(self) -> list[str]:
        found = rank_problems("r", self.r)
        for name in ("prefix_positions", "suffix_positions"):
            found += count_problems(name, getattr(self, name), 1_048_576, least=0)
        if not found and not self.prefix_positions and not self.suffix_positions:
            found.append("prefix_positions and suffix_positions are both 0: nothing is edited")
        return found

    def _canonical(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if isinstance(self.modules_to_save, str | list):
            given = self.modules_to_save
            found["modules_to_save"] = (given,) if isinstance(given, str) else tuple(given)
        layers = self.layers_to_transform
        if isinstance(layers, list | range):
            found["layers_to_transform"] = tuple(layers)
        elif isinstance(layers, int) and not isinstance(layers, bool):
            found["layers_to_transform"] = (layers,)
        return found


def orthonormal(free: Tensor) -> Tensor:
    """The nearest rows (r, H) that a QR decomposition makes orthonormal, each on the side of its
    own: what is orthonormal already stays.
    """
    wide = free.t() if free.dtype == torch.float64 else free.t().float()
    Q, triangle = torch.linalg.qr(wide)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(Q.dtype)
    return (Q * signs).t()
