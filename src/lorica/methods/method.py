"""The joint between a method and the places that it adapts.

A method is a frozen dataclass: its fields are what the user writes, and its functions are what
computes. It never sees an adapter's name, a row index, a file or a quantizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from lorica.config.settings import STATE

Tensors = dict[str, Tensor]
"""The tensors of one adapter at one place, by the method's own names ("A", "B", ...)."""

LayerKind = Literal["linear", "embedding", "conv1d", "conv2d", "experts", "block", "model", "other"]


def _no_state() -> tuple[int, ...]:
    return ()


def _no_bias() -> None:  # no lambda: a layer is pickled with its model
    return None


@dataclass(frozen=True, eq=False)
class Layer:
    """What a method may know of the layer it adapts.

    Attributes:
        kind: what the layer computes. "experts" is a stack of linear layers in one 3-D parameter;
            "block" is a module around linear layers, such as a feed-forward, of whose input and
            output alone the sizes are known; "model" is the stack of layers of a transformers
            model with its embeddings, which are `weight`; "other" is any module that owns
            parameters (a norm, say) and can only be copied.
        in_features, out_features: sizes; for an embedding the vocabulary and the width; for a
            convolution the channels.
        weight: makes a plain copy of the weight in float32: (out, in), embedding (vocabulary,
            width), convolution (out, in / groups, *kernel), experts (experts, out, in).
        bias: whether there is one.
        num_experts: the first dimension of an experts layer, else 0.
        kernel_size: of a convolution, else empty.
        geometry: keyword arguments of a convolution (see `ops.lora.lora_conv`); of a model its
            num_layers, num_heads and head_dim of keys and values, positions (None: no limit),
            bidirectional, and no_prefix: why there can be no keys and values in front; else empty.
        output_scale: what the layer multiplies its output with (scaled embeddings), else 1.
        parameters: makes copies of all own parameters by name.
        stored: the weight in the layout of `weight` and in its own dtype, without a copy where the
            base has it as plain numbers. It is the base's: read it, never write it.
        rounded: whether the base holds its weight quantized, and `weight` is what is left of it.
        exact: makes the weight as it was before that, in float32 and laid out as `weight` is; None
            where it is not at hand.
        state: numbers that change whenever the weight may have changed.
        bias_values: the base's bias (out,), likewise only to be read; None where there is none.
    """

    kind: LayerKind
    in_features: int
    out_features: int
    weight: Callable[[], Tensor]
    bias: bool = False
    num_experts: int = 0
    kernel_size: tuple[int, ...] = ()
    geometry: dict[str, Any] = field(default_factory=dict)
    output_scale: float = 1.0
    parameters: Callable[[], Tensors] = dict
    stored: Callable[[], Tensor] = torch.Tensor
    bias_values: Callable[[], Tensor | None] = _no_bias
    state: Callable[[], tuple[int, ...]] = _no_state
    rounded: bool = False
    exact: Callable[[], Tensor] | None = None

    @property
    def shape(self) -> str:
        """The sizes as people write them."""
        size = f"{self.in_features} -> {self.out_features}"
        return f"{self.num_experts} x ({size})" if self.num_experts else size


@runtime_checkable
class Method(Protocol):
    """One way to adapt a layer. Implementations are frozen dataclasses and final."""

    kind: ClassVar[str]
    replaces: ClassVar[bool]
    """Whether the adapted layer stands in for the base layer (a full copy) or adds to it."""
    stacks: ClassVar[bool]
    """Whether it is a product of two factors on linear layers, given by `segment`: then mixtures
    and several adapters in one batch go through `ops.lora.lora_linear` together."""
    frozen: ClassVar[frozenset[str]]
    """Names of its tensors that do not train."""

    @property
    def dropout(self) -> float:
        """Share of the layer's input that is dropped before the method, in training only."""
        ...

    def at(self, path: str) -> Method:
        """The settings at one place, with everything that depends on the place's name resolved."""
        ...

    def problems(self, layer: Layer) -> list[str]:
        """Why this layer cannot be adapted so; empty when it can."""
        ...

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        """Fresh tensors in float32 on the CPU. The adapted layer equals the base at step 0."""
        ...

    def apply(self, x: Tensor, y: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        """The adapted output, given the input `x` and the base output `y`."""
        ...

    def merged(self, weight: Tensor, tensors: Tensors, layer: Layer) -> Tensor | None:
        """The adapted weight in the dtype of `weight`; None where there is no such weight."""
        ...


def becomes_weight(method: Method) -> bool:
    """Whether some weight, or a bias, makes the base answer as the method does."""
    return method.replaces or hasattr(method, "delta") or hasattr(method, "merged_bias")


def is_chosen(method: object) -> bool:
    """Whether its places or tensors are chosen before it is attached, from records or from all
    weights together; `train.starts` does so.
    """
    return any(getattr(method, name, False) for name in ("needs_records", "needs_choice"))


def setting(default: Any, text: str, **more: Any) -> Any:
    """A field of a method's dataclass, with the line that help and documentation show."""
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": text}, **more)
    return field(default=default, metadata={"help": text}, **more)


def state(default: Any) -> Any:
    """A field of a method's dataclass that no setting of a run is: found out when the adapter is
    made or when its training ends, and kept in its files.
    """
    return field(default=default, metadata={STATE: True})


def numeric_problems(settings: object, ranges: dict[str, tuple[float, float]]) -> list[str]:
    """Every field of `settings` that lies outside its closed range, as sentences."""
    found = []
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            found.append(f"{name} is {value!r}; it must lie between {low:g} and {high:g}")
    return found
