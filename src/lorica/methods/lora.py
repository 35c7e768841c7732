"""LoRA: the weight of a frozen layer plus a product of two thin factors.

    Y = X W^T + s ((X A^T) B^T)        s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), equation 3;
the scale by the root of the rank is Kalajdzievski 2023, "A Rank Stabilization Scaling Factor"
(arXiv 2312.03732).

Legend: I in features, O out features, R rank, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lorica.errors import ConfigError, nearest
from lorica.methods.method import Layer, Tensors, numeric_problems
from lorica.methods.patterns import pattern_value
from lorica.ops.lora import Segment, lora_conv, lora_embedding, lora_linear


def _setting(default: Any, text: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class LoRA:
    """Settings and arithmetic of LoRA. The field names are PEFT's.

    Raises:
        ConfigError: a value is out of range; all problems at once.
    """

    r: int = _setting(8, "rank of the update")
    lora_alpha: float = _setting(16, "the update is scaled by lora_alpha / r")
    lora_dropout: float = _setting(0.0, "share of a layer's input dropped before A, in training")
    target_modules: str | tuple[str, ...] = _setting(
        "auto",
        "layers to adapt: auto, all-linear, attention, mlp, names or suffixes, or a pattern with * "
        "and {a,b}",
    )
    exclude_modules: str | tuple[str, ...] = _setting(
        (), "names, suffixes or patterns to leave out"
    )
    rank_pattern: Mapping[str, int] = _setting(
        {}, "another rank for some layers: {suffix or pattern: r}"
    )
    alpha_pattern: Mapping[str, float] = _setting({}, "another lora_alpha for some layers")
    use_rslora: bool = _setting(False, "scale by lora_alpha / sqrt(r) instead of lora_alpha / r")
    layers_to_transform: str | tuple[int, ...] | None = _setting(
        None, "only these layers, by number: 0,3,5 or a range such as 0-3"
    )
    modules_to_save: str | tuple[str, ...] = _setting(
        (), "modules trained whole beside the adapter, such as a new head"
    )
    init_lora_weights: bool | Literal["kaiming", "gaussian", "random"] = _setting(
        "kaiming", "start of A (B is zero); random also fills B, for debugging"
    )

    kind: ClassVar[str] = "lora"
    replaces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in _canonical(self).items():
            object.__setattr__(self, name, value)
        if found := _problems(self):
            raise ConfigError("LoRA's settings cannot be used", problems=found)

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def scale(self) -> float:
        """What multiplies the product of the factors."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def at(self, path: str) -> LoRA:
        rank = pattern_value(self.rank_pattern, path)
        alpha = pattern_value(self.alpha_pattern, path)
        return replace(
            self,
            r=self.r if rank is None else rank,
            lora_alpha=self.lora_alpha if alpha is None else alpha,
            rank_pattern={},
            alpha_pattern={},
        )

    def problems(self, layer: Layer) -> list[str]:
        if layer.kind == "other":
            return ["LoRA needs a linear, embedding, convolution or experts layer"]
        smallest = min(layer.in_features * math.prod(layer.kernel_size), layer.out_features)
        found = []
        if self.r > smallest:
            found.append(f"r={self.r} is more than the layer's own rank of at most {smallest}")
        groups = layer.geometry.get("groups", 1)
        if self.r % groups:
            found.append(f"r={self.r} is not a multiple of the convolution's {groups} groups")
        return found

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        shape_A, shape_B = _shapes(layer, self.r)
        A, B = _INITS[str(self.init_lora_weights)](shape_A, shape_B, layer, generator)
        return {"A": A, "B": B}

    def apply(self, x: Tensor, y: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        A, B = tensors["A"], tensors["B"]
        if layer.kind == "linear":
            return lora_linear(x, y.clone(), [self.segment(tensors)])
        if layer.kind == "embedding":
            return lora_embedding(x, y, A, B, self.scale * layer.output_scale)
        return lora_conv(x, y, A, B, self.scale, layer.geometry)

    def segment(self, tensors: Tensors, start: int = 0, end: int | None = None) -> Segment:
        """The fast path of linear layers: these factors for rows `start` to `end`."""
        return Segment(start, end, tensors["A"], tensors["B"], scale=self.scale)

    def delta(self, tensors: Tensors, layer: Layer) -> Tensor:
        """The update as a weight, in the shape of `Layer.weight` and the dtype of the factors."""
        A, B = tensors["A"], tensors["B"]
        if layer.kind == "embedding":
            return (B @ A).t() * self.scale
        if layer.kind in ("conv1d", "conv2d"):
            return torch.tensordot(B.flatten(1), A, dims=1) * self.scale
        return (B @ A) * self.scale  # (O, R) @ (R, I), or the same for every expert

    def merged(self, weight: Tensor, tensors: Tensors, layer: Layer) -> Tensor | None:
        if layer.geometry.get("groups", 1) > 1:
            return None  # A is not grouped, so the sum is no grouped convolution
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        tensors = {name: tensor.detach().to(wide) for name, tensor in tensors.items()}
        return (weight.to(wide) + self.delta(tensors, layer)).to(weight.dtype)


def _canonical(given: LoRA) -> dict[str, Any]:
    """One spelling for each value: settings from YAML, flags, Python and files are then equal."""
    found: dict[str, Any] = {}
    for name in ("exclude_modules", "modules_to_save", "target_modules", "layers_to_transform"):
        value = getattr(given, name)
        if isinstance(value, list | set | range):
            found[name] = tuple(sorted(value) if isinstance(value, set) else value)
        elif (isinstance(value, str) and name in ("exclude_modules", "modules_to_save")) or (
            isinstance(value, int) and not isinstance(value, bool)
        ):
            found[name] = (value,)
    if isinstance(given.init_lora_weights, bool):  # PEFT's spelling of the two
        found["init_lora_weights"] = "kaiming" if given.init_lora_weights else "random"
    found["lora_alpha"] = _whole(given.lora_alpha)
    found["alpha_pattern"] = {key: _whole(alpha) for key, alpha in given.alpha_pattern.items()}
    return found


def _whole(number: Any) -> Any:
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _problems(given: LoRA) -> list[str]:
    found = numeric_problems(given, {"r": (1, 65536), "lora_dropout": (0.0, 0.99)})
    if not isinstance(given.r, int):
        found.append(f"r is {given.r!r}; it must be a whole number")
    found += _scale_problems("lora_alpha", given.lora_alpha)
    for key, rank in given.rank_pattern.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            found.append(f"rank_pattern[{key!r}] is {rank!r}; it must be a whole number above 0")
    for key, alpha in given.alpha_pattern.items():
        found += _scale_problems(f"alpha_pattern[{key!r}]", alpha)
    if given.init_lora_weights not in _INITS:
        near = nearest(str(given.init_lora_weights), _INITS)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(_INITS)}"
        found.append(f"init_lora_weights is {given.init_lora_weights!r}; {hint}")
    return found


def _scale_problems(name: str, value: object) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e4:
        return [f"{name} is {value!r}; it must be more than 0 and at most 10,000"]
    return []


def _shapes(layer: Layer, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    i, o = layer.in_features, layer.out_features
    if layer.kind == "experts":
        return (layer.num_experts, r, i), (layer.num_experts, o, r)
    groups = layer.geometry.get("groups", 1)
    return (r, i, *layer.kernel_size), (o, r // groups, *(1 for _ in layer.kernel_size))


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


def _kaiming(
    shape_A: tuple, shape_B: tuple, layer: Layer, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A uniform within 1 / sqrt(fan in), which is Kaiming's rule with slope sqrt(5); B zero.

    An embedding has it the other way round: a row of A is one number per token of the vocabulary,
        and must
    be zero so that tokens never seen in training stay as they were.
    """
    if layer.kind == "embedding":
        return torch.zeros(shape_A), torch.randn(shape_B, generator=generator)
    fan_in = layer.in_features * math.prod(layer.kernel_size)
    return _uniform(shape_A, 1 / math.sqrt(fan_in), generator), torch.zeros(shape_B)


def _gaussian(
    shape_A: tuple, shape_B: tuple, layer: Layer, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    if layer.kind == "embedding":
        return _kaiming(shape_A, shape_B, layer, generator)
    r = shape_A[1] if layer.kind == "experts" else shape_A[0]
    return torch.randn(shape_A, generator=generator) / r, torch.zeros(shape_B)


def _random(
    shape_A: tuple, shape_B: tuple, layer: Layer, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Both factors filled: not an identity at step 0. For tests and debugging."""
    A, B = _kaiming(shape_A, shape_B, layer, generator)
    if layer.kind == "embedding":
        return _uniform(shape_A, 1 / math.sqrt(shape_A[0]), generator), B
    return A, _uniform(shape_B, 1 / math.sqrt(layer.in_features), generator)


_INITS: dict[str, Callable[[tuple, tuple, Layer, torch.Generator], tuple[Tensor, Tensor]]] = {
    "kaiming": _kaiming,
    "gaussian": _gaussian,
    "random": _random,
}
