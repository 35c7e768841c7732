"""Prefix tuning: trained keys and values in front of those that every layer makes of the input.

    attention(Q, [P_K ; K], [P_V ; V])       with its own P_K, P_V in every layer

Li and Liang 2021, "Prefix-Tuning" (arXiv 2101.00190), section 4, make them by a small network out
of one matrix while they train; Liu et al. 2022, "P-Tuning v2" (arXiv 2110.07602), train them as
they are. Afterwards only the keys and values are needed, and only they are written to files.

Legend: P virtual tokens, N layers, K key-value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.methods.method import Layer, Tensors, setting
from lorica.methods.virtual import VirtualTokens, count_problems, linear_start

START = 0.02
"""Standard deviation at the start: values near zero disturb the model least."""


@dataclass(frozen=True)
class PrefixTuning(VirtualTokens):
    """Settings and arithmetic of prefix tuning."""

    prefix_projection: bool = setting(
        False, "make keys and values by a small network while they train"
    )
    encoder_hidden_size: int = setting(
        0, "width inside of that network; 0: that of keys and values"
    )

    kind: ClassVar[str] = "prefix-tuning"
    title: ClassVar[str] = "trained keys and values in every layer (arXiv 2101.00190)"
    folded: ClassVar[str] = "prefix"

    def problems(self, layer: Layer) -> list[str]:
        found = super().problems(layer)
        return found or list(layer.geometry.get("no_prefix", ()))

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        width = layer.geometry["num_heads"] * layer.geometry["head_dim"]
        count, columns = self.num_virtual_tokens, 2 * layer.geometry["num_layers"] * width
        if not self.prefix_projection:
            return {"prefix": START * torch.randn(count, columns, generator=generator)}
        hidden = self.encoder_hidden_size or width
        found = {"embedding": torch.randn(count, width, generator=generator)}
        found |= linear_start(hidden, width, generator, "mlp.0")
        return found | linear_start(columns, hidden, generator, "mlp.1")

    def fold(self, tensors: Tensors) -> Tensor:
        """What acts, as one matrix (P, N * 2 * K * D)."""
        if self.folded in tensors:
            return tensors[self.folded]
        inner = F.linear(tensors["embedding"], tensors["mlp.0.weight"], tensors["mlp.0.bias"])
        return F.linear(torch.tanh(inner), tensors["mlp.1.weight"], tensors["mlp.1.bias"])

    def key_values(self, tensors: Tensors, layer: Layer) -> Tensor:
        """Keys and values of every layer (N, 2, K, P, D)."""
        flat, size = self.fold(tensors), layer.geometry
        shape = size["num_layers"], 2, size["num_heads"], size["head_dim"]
        return flat.view(flat.shape[0], *shape).permute(1, 2, 3, 0, 4)

    def _problems(self) -> list[str]:
        found = super()._problems()
        found += count_problems("encoder_hidden_size", self.encoder_hidden_size, 65536, least=0)
        if self.encoder_hidden_size and not self.prefix_projection:
            found.append("encoder_hidden_size has no effect without prefix_projection")
        return found
