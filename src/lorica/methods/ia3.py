"""IA3: keys, values and the input of each feed-forward output are multiplied by learned vectors.

    k = l_k * (W_k x + b),  v = l_v * (W_v x + b),  feed-forward: W_2 (l * f(...))

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning" (arXiv 2205.05638), section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lorica.methods.method import Layer, Tensors, setting
from lorica.methods.patterns import Pattern, compiled
from lorica.methods.placed import Placed
from lorica.ops.weight import apply_conv, apply_linear

FEEDFORWARD = (
    "down_proj",
    "mlp.c_proj",
    "mlp.fc2",
    "fc2",
    "dense_4h_to_h",
    "DenseReluDense.wo",
    "output.dense",
    "lin2",
    "fc_out",
    "ffn_output",
    "output_dense",
    "shared_mlp.output_linear",
    "feed_forward.w2",
    "w2",
    "linear2",
    "ff.net.2",
)
"""Ends of the names of layers that are a feed-forward's output."""
NOT_FEEDFORWARD = ("attention.output.dense", "crossattention.output.dense")
KEY_VALUE = (
    "k_proj",
    "v_proj",
    "key",
    "value",
    "k",
    "v",
    "k_lin",
    "v_lin",
    "key_proj",
    "value_proj",
    "query_key_value",
    "qkv_proj",
    "c_attn",
    "Wqkv",
    "qkv",
    "attn.to_k",
    "attn.to_v",
    "kv_b_proj",
)
"""Ends of the names of layers that make keys and values, or both with the queries."""
ATTENTION_OUTPUT = (
    "o_proj",
    "out_proj",
    "attn.c_proj",
    "attention.output.dense",
    "crossattention.output.dense",
    "self_attention.dense",
    "attention.dense",
    "self_attn.dense",
    "SelfAttention.o",
    "EncDecAttention.o",
    "out_lin",
    "attn.proj",
    "to_out.0",
)
"""Ends of the names of layers that are an attention's output."""


@dataclass(frozen=True)
class IA3(Placed):
    """Settings and arithmetic of IA3.

    On layers of `feedforward_modules` the vector multiplies the input, elsewhere the output, bias
    included.
    """

    feedforward_modules: str | tuple[str, ...] = setting(
        "auto", "layers whose input is scaled, and not the output; auto: known by their names"
    )
    on_input: bool | None = setting(None, "scale the input; null: as feedforward_modules says")

    kind: ClassVar[str] = "ia3"
    title: ClassVar[str] = "scales of keys, values and feed-forward (arXiv 2205.05638)"
    auto: ClassVar[str] = "key-value-feedforward"

    def at(self, path: str) -> Self:
        if self.on_input is not None:
            return self
        return replace(self, on_input=self._is_feedforward(path))

    def problems(self, layer: Layer) -> list[str]:
        if layer.kind not in ("linear", "embedding", "conv1d", "conv2d"):
            return ["ia3 needs a linear, embedding or convolution layer"]
        if layer.kind == "embedding" and self.on_input:
            return ["the input of an embedding is no vector that could be scaled"]
        return []

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        return {"l": torch.ones(layer.in_features if self.on_input else layer.out_features)}

    def apply(self, x: Tensor, y: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        scale = _channels(tensors["l"].to(y.dtype), layer)
        if not self.on_input:
            return y * scale
        more = (scale - 1) * x.to(y.dtype)
        weight = layer.stored().to(y.dtype)
        if layer.kernel_size:
            return apply_conv(more, y, weight, layer.geometry)
        return apply_linear(more, y, weight)

    def merged(self, weight: Tensor, tensors: Tensors, layer: Layer) -> Tensor | None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = tensors["l"].detach().to(wide)
        if not self.on_input and layer.kind != "embedding":
            scale = scale.view(-1, *[1] * (weight.dim() - 1))
        elif layer.kernel_size:
            if layer.geometry["groups"] > 1:
                scale = _per_group(scale, weight, layer)
            scale = scale.view(-1, weight.shape[1], *[1] * len(layer.kernel_size))
        return (weight.to(wide) * scale).to(weight.dtype)

    def merged_bias(self, bias: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        """The adapted bias in the dtype of `bias`: the output is scaled with it."""
        wide = torch.promote_types(bias.dtype, torch.float32)
        scale = 1.0 if self.on_input else tensors["l"].detach().to(wide)
        return (bias.to(wide) * scale).to(bias.dtype)

    def _is_feedforward(self, path: str) -> bool:
        given = self.feedforward_modules
        if given == "auto":
            return _ends(path, FEEDFORWARD) and not _ends(path, NOT_FEEDFORWARD)
        return any(pattern.matches(path) for pattern in self._patterns())

    def _patterns(self) -> list[Pattern]:
        given = self.feedforward_modules
        return [compiled(name) for name in ([given] if isinstance(given, str) else given)]

    def _canonical(self) -> dict[str, Any]:
        found = super()._canonical()
        if isinstance(self.feedforward_modules, list | set):
            found["feedforward_modules"] = tuple(sorted(self.feedforward_modules))
        return found


def _ends(path: str, names: Any) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _channels(scale: Tensor, layer: Layer) -> Tensor:
    """(C,) as it meets activations: last, or first before the sizes of a convolution."""
    return scale.view(-1, *[1] * len(layer.kernel_size))


def _per_group(scale: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    """(I,) -> (O, I / groups): every output sees the inputs of its group."""
    groups = layer.geometry["groups"]
    return scale.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
