"""What methods have in common that put virtual tokens in front of the input, not a layer beside.

They sit on the stack of layers as a whole, which `Layer` describes as of kind "model", and their
own small protocol is

    start(layer, generator) -> tensors
    embeddings(tensors) -> (P, H)              prompts: in front of the embedded tokens
    key_values(tensors, layer) -> (N, 2, K, P, D)   prefixes: what every layer has seen before

The adapted model is not the base at step 0: the virtual tokens are there from the start.

Legend: P virtual tokens, H width of the embeddings, N layers, K key-value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lorica.methods.method import Layer, Tensors, setting
from lorica.methods.placed import MethodSettings

MAX_TOKENS = 65536


@dataclass(frozen=True, kw_only=True)
class VirtualTokens(MethodSettings):
    """The settings that all of them share.

    Raises:
        ConfigError: a value is out of range; all problems at once.
    """

    num_virtual_tokens: int = setting(20, "virtual tokens in front of every input")
    modules_to_save: str | tuple[str, ...] = setting(
        (), "modules trained whole beside the adapter, such as a new head"
    )

    folded: ClassVar[str]
    """Name of the one tensor that is left when whatever made it is no longer needed."""

    def problems(self, layer: Layer) -> list[str]:
        if layer.kind != "model":
            return [f"{self.kind} sits on a model of transformers that embeds tokens"]
        return []

    def _problems(self) -> list[str]:
        return count_problems("num_virtual_tokens", self.num_virtual_tokens, MAX_TOKENS)

    def _canonical(self) -> dict[str, Any]:
        given = self.modules_to_save
        whole = (given,) if isinstance(given, str) else tuple(given)
        return {"modules_to_save": whole}


def count_problems(name: str, value: object, most: int, *, least: int = 1) -> list[str]:
    """Why a value cannot be a number of things."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        return [f"{name} is {value!r}; it must be a whole number from {least} to {most:,}"]
    return []


def linear_start(out: int, into: int, generator: torch.Generator, name: str) -> Tensors:
    """Weight and bias of a linear layer as torch starts them: uniform in +-1 / sqrt(into)."""
    bound = into**-0.5
    shapes = {"weight": (out, into), "bias": (out,)}
    return {
        f"{name}.{key}": torch.empty(shape).uniform_(-bound, bound, generator=generator)
        for key, shape in shapes.items()
    }


def embedded(layer: Layer, ids: Tensor) -> Tensor:
    """The embeddings of tokens (P,) as the base makes them, in float32 on the CPU: (P, H)."""
    table = layer.stored()
    return table[ids.to(table.device)].float().cpu() * layer.output_scale
