"""Parts of UniPELT: updates that a gate opens by as much as the text at hand needs them.

    G = mean over the text's tokens of sigmoid(w x + b)        x: what the part is given

    LoRA         y + G (x A^T) B^T             x: what the layer is given; G stands for alpha / r
    bottleneck   y + G s U f(D y)              x: what the bottleneck is given
    prefix       G P_K and G P_V in front      x: what the layer's attention is given

Mao et al. 2022, "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning" (arXiv
2110.07577), section 3. A method sees no texts: it says what each token gives for the gate, and the
place where it sits takes the mean over the tokens of each text (`attach.gates`).

Legend: I in features, O out features, R rank, H width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.methods.bottleneck import Bottleneck
from lorica.methods.method import Layer, Tensors, setting
from lorica.methods.placed import Placed, rank_problems
from lorica.methods.prefix_tuning import PrefixTuning
from lorica.methods.update import uniform
from lorica.ops.lora import Segment, lora_linear

START = 0.02
"""Standard deviation of a gate's weight at the start, as of BERT's: every gate begins near 1/2."""

QUERY_VALUE = (
    "q_proj",
    "v_proj",
    "query",
    "value",
    "q",
    "v",
    "q_lin",
    "v_lin",
    "query_proj",
    "value_proj",
    "query_key_value",
    "qkv_proj",
    "c_attn",
    "Wqkv",
    "qkv",
    "attn.to_q",
    "attn.to_v",
    "q_b_proj",
    "kv_b_proj",
)
"""Ends of the names of layers that make queries and values, or both with the keys."""


def open_by(x: Tensor, tensors: Tensors) -> Tensor:
    """How far each token of x (..., H) would open the gate: (..., 1), between 0 and 1."""
    return torch.sigmoid(F.linear(x, tensors["gate"].to(x.dtype), tensors["gate_bias"].to(x.dtype)))


def gate_start(width: int, generator: torch.Generator) -> Tensors:
    """A gate that has learned nothing."""
    weight = START * torch.randn(1, width, generator=generator)
    return {"gate": weight, "gate_bias": torch.zeros(1)}


@dataclass(frozen=True)
class GatedLoRA(Placed):
    """LoRA with a gate in place of its scale. `apply` is what it does with the gate wide open."""

    r: int = setting(8, "rank of the update")

    kind: ClassVar[str] = "gated-lora"
    title: ClassVar[str] = "LoRA that a gate opens for each text (arXiv 2110.07577)"
    auto: ClassVar[str] = "query-value"

    def problems(self, layer: Layer) -> list[str]:
        if layer.kind == "model":  # which only tells where texts begin and end
            return []
        if layer.kind != "linear":
            return [f"{self.kind} sits on linear layers"]
        smallest = min(layer.in_features, layer.out_features)
        if self.r > smallest:
            return [f"r={self.r} is more than the layer's own rank of at most {smallest}"]
        return []

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        if layer.kind == "model":
            return {}
        A = uniform((self.r, layer.in_features), layer.in_features, generator)
        own = {"A": A, "B": torch.zeros(layer.out_features, self.r)}
        return own | gate_start(layer.in_features, generator)

    def gate(self, x: Tensor, y: Tensor, tensors: Tensors) -> Tensor:
        return open_by(x.to(y.dtype), tensors)

    def apply(self, x: Tensor, y: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        return lora_linear(x, y.clone(), [Segment(0, None, tensors["A"], tensors["B"])])

    def merged(self, weight: Tensor, tensors: Tensors, layer: Layer) -> Tensor | None:
        return None  # the gate is another one for every text

    def _problems(self) -> list[str]:
        return rank_problems("r", self.r)


@dataclass(frozen=True)
class GatedBottleneck(Bottleneck):
    """A bottleneck with a gate. `apply` is what it does with the gate wide open."""

    layout: Literal["houlsby", "pfeiffer", "parallel"] = setting(
        "pfeiffer",
        "behind attention and feed-forward (houlsby), behind feed-forward (pfeiffer), or beside it",
    )

    kind: ClassVar[str] = "gated-adapter"
    title: ClassVar[str] = "bottlenecks that a gate opens for each text (arXiv 2110.07577)"

    def problems(self, layer: Layer) -> list[str]:
        return [] if layer.kind == "model" else super().problems(layer)

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        if layer.kind == "model":
            return {}
        width = self._width_in(layer)
        return super().start(layer, generator) | gate_start(width, generator)

    def gate(self, x: Tensor, y: Tensor, tensors: Tensors) -> Tensor:
        return open_by(x.to(y.dtype) if self.layout == "parallel" else y, tensors)


@dataclass(frozen=True)
class GatedPrefixTuning(PrefixTuning):
    """A prefix with a gate for each layer, which lies at that layer's attention."""

    kind: ClassVar[str] = "gated-prefix"
    title: ClassVar[str] = "a prefix that gates open for each text (arXiv 2110.07577)"

    def problems(self, layer: Layer) -> list[str]:
        return [] if layer.kind == "block" else super().problems(layer)

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        if layer.kind == "block":
            return gate_start(layer.in_features, generator)
        return super().start(layer, generator)

    def gate(self, x: Tensor, y: Tensor, tensors: Tensors) -> Tensor:
        return open_by(x, tensors)
