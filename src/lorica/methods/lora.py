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
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from lorica.errors import nearest
from lorica.methods.loftq import closest, loftq
from lorica.methods.method import Layer, Tensors, numeric_problems, setting
from lorica.methods.patterns import pattern_value
from lorica.methods.placed import Placed, rank_problems, scale_problems, whole
from lorica.methods.update import as_matrix
from lorica.ops.lora import Segment, lora_conv, lora_embedding, lora_linear


@dataclass(frozen=True)
class LoRA(Placed):
    """Settings and arithmetic of LoRA. The field names are PEFT's.

    Raises:
        ConfigError: a value is out of range; all problems at once.
    """

    r: int = setting(8, "rank of the update")
    lora_alpha: float = setting(16, "the update is scaled by lora_alpha / r")
    lora_dropout: float = setting(0.0, "share of a layer's input dropped before A, in training")
    rank_pattern: Mapping[str, int] = setting(
        {}, "another rank for some layers: {suffix or pattern: r}"
    )
    alpha_pattern: Mapping[str, float] = setting({}, "another lora_alpha for some layers")
    use_rslora: bool = setting(False, "scale by lora_alpha / sqrt(r) instead of lora_alpha / r")
    init_lora_weights: (
        bool
        | Literal[
            "kaiming",
            "gaussian",
            "orthogonal",
            "pissa",
            "olora",
            "loftq",
            "eva",
            "lora_ga",
            "random",
        ]
    ) = setting(
        "kaiming",
        "start of A, with B zero: kaiming, gaussian; of both: orthogonal; from the weight: pissa, "
        "olora, loftq; from records: eva, lora_ga; random changes the base's answers, for "
        "debugging",
    )
    init_records: int = setting(64, "records that decide the start, with eva and lora_ga")
    eva_rho: float = setting(
        2.0, "eva: a layer gets at most so many times r; 1: every layer keeps its own r"
    )
    eva_tau: float = setting(
        0.99, "eva: a direction is found when it moves less than this cosine from batch to batch"
    )
    lora_ga_gamma: float = setting(16.0, "lora_ga: the start is scaled by 1 / sqrt(gamma)")
    loftq_iter: int = setting(1, "loftq: rounds of quantizing and decomposing")

    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = setting(
        (),
        "tokens whose rows of the embedding train too, such as new ones: [5, 6], or by the name of "
        "the embedding {embed_tokens: [5, 6]}",
    )

    kind: ClassVar[str] = "lora"
    title: ClassVar[str] = "a product of two thin factors beside a weight (arXiv 2106.09685)"
    stacks: ClassVar[bool] = True
    frozen: ClassVar[frozenset[str]] = frozenset({"A0", "B0"})

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def scale(self) -> float:
        """What multiplies the product of the factors."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def subtracts(self) -> bool:
        """Whether both factors are filled at the start, and their first product is subtracted."""
        return self.init_lora_weights in (*DECOMPOSING, "lora_ga")

    @property
    def needs_records(self) -> bool:
        """Whether the start depends on the task's records; `train.starts` then makes it."""
        return self.init_lora_weights in BY_RECORDS

    @property
    def needs_gradients(self) -> bool:
        """Whether the start sums up a gradient of every weight."""
        return self.init_lora_weights == "lora_ga"

    @property
    def num_records(self) -> int:
        """How many of them."""
        return self.init_records

    def stand_in(self) -> Self:
        """Settings of the same size whose start needs no records."""
        if not self.needs_records:
            return self
        plain = "olora" if self.init_lora_weights == "lora_ga" else "kaiming"
        free = {name: f.default for name, f in self.__dataclass_fields__.items() if name in _START}
        return replace(self, **free, init_lora_weights=plain)

    def at(self, path: str) -> Self:
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
        if layer.kind in ("other", "block", "model"):
            return [f"{self.kind} needs a linear, embedding, convolution or experts layer"]
        smallest = min(layer.in_features * math.prod(layer.kernel_size), layer.out_features)
        found = []
        if self.r > smallest:
            found.append(f"r={self.r} is more than the layer's own rank of at most {smallest}")
        groups = layer.geometry.get("groups", 1)
        if self.r % groups:
            found.append(f"r={self.r} is not a multiple of the convolution's {groups} groups")
        if self.init_lora_weights in (*DECOMPOSING, *BY_RECORDS) and groups > 1:
            found.append(f"the weight of a grouped convolution has no {self.init_lora_weights}")
        if self.init_lora_weights == "loftq" and layer.rounded and layer.exact is None:
            found.append(
                "init_lora_weights=loftq makes up for what quantization took away, and the weights "
                "before it are not at hand: load the base in full precision with quantize"
            )
        if self.init_lora_weights == "loftq" and layer.rounded and self.loftq_iter > 1:
            found.append(
                f"loftq_iter={self.loftq_iter} has no effect on a base that is quantized already"
            )
        if self.init_lora_weights == "eva" and layer.kind != "linear":
            found.append("init_lora_weights=eva needs a linear layer, whose inputs it looks at")
        if self.init_lora_weights == "lora_ga" and self.r <= smallest < 2 * self.r:
            found.append(
                f"init_lora_weights=lora_ga takes {2 * self.r} directions of the gradient for "
                f"r={self.r}, and this layer has {smallest}"
            )
        return found

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        if self.needs_records:  # by chance; `train.starts` gives chosen ones
            return self.stand_in().start(layer, generator)
        init = str(self.init_lora_weights)
        if init == "loftq" and layer.rounded:
            return self._correction(layer)
        if init in DECOMPOSING:
            how = {"iterations": self.loftq_iter} if init == "loftq" else {}
            A, B = DECOMPOSING[init](as_matrix(layer.weight(), layer), self.r, self.scale, **how)
            shape_A, shape_B = _shapes(layer, self.r)
            A, B = A.reshape(shape_A).contiguous(), B.reshape(shape_B).contiguous()
            return {"A": A, "B": B, "A0": A.clone(), "B0": B.clone()}
        shape_A, shape_B = _shapes(layer, self.r)
        A, B = _INITS[init](shape_A, shape_B, layer, generator)
        return {"A": A, "B": B}

    def _correction(self, layer: Layer) -> Tensors:
        """What quantization took away from the weight, as far as the rank holds it.

        The base stays what it is, so one decomposition is the best there is. This start changes the
        answers of the quantized base, towards those of the base in full precision.
        """
        assert layer.exact is not None  # by `problems`
        lost = as_matrix(layer.exact().to(layer.weight()) - layer.weight(), layer)
        A, B = closest(lost, self.r, self.scale)
        shape_A, shape_B = _shapes(layer, self.r)
        A, B = A.reshape(shape_A).contiguous(), B.reshape(shape_B).contiguous()
        return {"A": A, "B": B, "A0": torch.zeros_like(A), "B0": torch.zeros_like(B)}

    def factors(self, tensors: Tensors, *, experts: bool = False) -> tuple[Tensor, Tensor]:
        """The factors whose product is the update; of experts a stack of both.

        Where the adapter began from parts of the weight, A0 and B0, their product is subtracted:
        B A - B0 A0 = [B, B - B0] [A - A0; A0], which is exactly zero at the start.
        """
        A, B = tensors["A"], tensors["B"]
        if "A0" not in tensors:
            return A, B
        A0, B0 = tensors["A0"], tensors["B0"]
        ranks = int(experts)  # the dimension of the ranks in A
        return torch.cat([A - A0, A0], ranks), torch.cat([B, B - B0], ranks + 1)

    def expanded(self) -> LoRA:
        """The settings for which what `factors` gives is plain LoRA: twice the rank, same scale."""
        more = math.sqrt(2) if self.use_rslora else 2
        return LoRA(
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name not in _RANKS},
            r=2 * self.r,
            lora_alpha=self.lora_alpha * more,
            rank_pattern={key: 2 * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: alpha * more for key, alpha in self.alpha_pattern.items()},
        )

    def apply(self, x: Tensor, y: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        if layer.kind == "linear":
            return lora_linear(x, y.clone(), [self.segment(tensors)])
        A, B = self.factors(tensors)
        if layer.kind == "embedding":
            return lora_embedding(x, y, A, B, self.scale * layer.output_scale)
        return lora_conv(x, y, A, B, self.scale, layer.geometry)

    def segment(self, tensors: Tensors, start: int = 0, end: int | None = None) -> Segment:
        """The fast path of linear layers: these factors for rows `start` to `end`."""
        A, B = self.factors(tensors)
        return Segment(start, end, A, B, scale=self.scale)

    def delta(self, tensors: Tensors, layer: Layer) -> Tensor:
        """The update as a weight, in the shape of `Layer.weight` and the dtype of the factors."""
        A, B = self.factors(tensors, experts=layer.kind == "experts")
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

    def _canonical(self) -> dict[str, Any]:
        found = super()._canonical()
        if isinstance(self.init_lora_weights, bool):  # PEFT's spelling of the two
            found["init_lora_weights"] = "kaiming" if self.init_lora_weights else "random"
        found["alpha_pattern"] = {key: whole(alpha) for key, alpha in self.alpha_pattern.items()}
        found["trainable_token_indices"] = _ascending(self.trainable_token_indices)
        return found

    def _problems(self) -> list[str]:
        found = rank_problems("r", self.r)
        found += numeric_problems(self, {"lora_dropout": (0.0, 0.99)})
        found += scale_problems("lora_alpha", self.lora_alpha)
        for key, rank in self.rank_pattern.items():
            found += rank_problems(f"rank_pattern[{key!r}]", rank)
        for key, alpha in self.alpha_pattern.items():
            found += scale_problems(f"alpha_pattern[{key!r}]", alpha)
        found += self._start_problems()
        inits = [*_INITS, *DECOMPOSING, *BY_RECORDS]
        if self.init_lora_weights not in inits:
            near = nearest(str(self.init_lora_weights), inits)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(inits)}"
            found.append(f"init_lora_weights is {self.init_lora_weights!r}; {hint}")
        if self.init_lora_weights == "orthogonal" and isinstance(self.r, int) and self.r % 2:
            found.append(f"init_lora_weights=orthogonal needs an even r, not {self.r}")
        found += _token_problems(self.trainable_token_indices)
        return found

    def _start_problems(self) -> list[str]:
        """What is wrong with the settings of single starts, or without effect."""
        ranges = {
            "init_records": (1, 10**6),
            "eva_rho": (1.0, 1000.0),
            "eva_tau": (0.0, 1.0),
            "lora_ga_gamma": (1e-6, 1e6),
            "loftq_iter": (1, 100),
        }
        found = numeric_problems(self, ranges)
        for name in ("init_records", "loftq_iter"):
            if isinstance(getattr(self, name), float):
                found.append(f"{name} is {getattr(self, name)!r}; it must be a whole number")
        for name, owners in _START.items():
            default = self.__dataclass_fields__[name].default
            if getattr(self, name) != default and self.init_lora_weights not in owners:
                found.append(
                    f"{name}={getattr(self, name)} has no effect with "
                    f"init_lora_weights={self.init_lora_weights}; it belongs to "
                    f"{' and '.join(owners)}"
                )
        return found


_START = {
    "init_records": ("eva", "lora_ga"),
    "eva_rho": ("eva",),
    "eva_tau": ("eva",),
    "lora_ga_gamma": ("lora_ga",),
    "loftq_iter": ("loftq",),
}
"""Settings of the start -> the starts that they belong to."""

_RANKS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights", *_START)


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA with A frozen at its start (Zhang et al. 2023, arXiv 2308.03303).

    Only B trains, so the layer's input need not be kept for the backward pass: just the product
    with A, which is as narrow as the rank.
    """

    kind: ClassVar[str] = "lora-fa"
    title: ClassVar[str] = "LoRA that trains B alone and keeps no inputs (arXiv 2308.03303)"
    frozen: ClassVar[frozenset[str]] = frozenset({"A", "A0", "B0"})

    def problems(self, layer: Layer) -> list[str]:
        if layer.kind == "embedding":
            return ["A of an embedding is zero at the start, and frozen it would stay so"]
        return super().problems(layer)


def _ascending(chosen: Any) -> Any:
    """Tokens in one order, however they were given."""
    if isinstance(chosen, Mapping):
        return {name: _ascending(indices) for name, indices in chosen.items()}
    try:
        return tuple(sorted(chosen))
    except TypeError:  # told by `_token_problems`
        return chosen


def _token_problems(chosen: Any) -> list[str]:
    """What is wrong with a choice of tokens."""
    if isinstance(chosen, Mapping):
        found = [text for indices in chosen.values() for text in _token_problems(indices)]
        empty = [name for name, indices in chosen.items() if not indices]
        return found + [f"trainable_token_indices[{name!r}] is empty" for name in empty]
    if not isinstance(chosen, tuple) or any(type(i) is not int or i < 0 for i in chosen):
        return ["trainable_token_indices must be whole numbers from 0"]
    twice = sorted({i for i in chosen if chosen.count(i) > 1})
    return [f"trainable_token_indices names the token {i} twice" for i in twice[:3]]


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
    and must be zero so that tokens never seen in training stay as they were.
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


def _orthogonal(
    shape_A: tuple, shape_B: tuple, layer: Layer, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Both factors filled, over halves of the ranks that are orthogonal, so that B A is zero.

    PEFT turns the halves into each other by a random rotation of the ranks. Here the rotation is
    the identity, so that the product is zero in every bit.
    """
    A = torch.randn(shape_A, generator=generator) / 10
    B = torch.randn(shape_B, generator=generator) / 10
    axis_A, axis_B = (1, 2) if layer.kind == "experts" else (0, 1)
    half = shape_A[axis_A] // 2
    A.narrow(axis_A, half, shape_A[axis_A] - half).zero_()
    B.narrow(axis_B, 0, min(half, shape_B[axis_B])).zero_()
    return A, B


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
    "orthogonal": _orthogonal,
    "random": _random,
}


def _pissa(matrix: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """The largest singular vectors (Meng et al. 2024, arXiv 2404.02948, equations 2 and 3)."""
    U, S, Vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    root = (S[..., :r] / scale).sqrt()
    return root.unsqueeze(-1) * Vh[..., :r, :], U[..., :r] * root.unsqueeze(-2)


def _olora(matrix: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """The first columns and rows of a QR decomposition (Büyükakyüz 2024, arXiv 2406.01775)."""
    Q, R = torch.linalg.qr(matrix.float())
    return R[..., :r, :], Q[..., :r]


DECOMPOSING: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "pissa": _pissa,
    "olora": _olora,
    "loftq": loftq,
}
"""Inits from parts of the weight: matrix (O, I), r, scale -> A, B."""

BY_RECORDS = ("eva", "lora_ga")
"""Inits that the task's records decide: `train.starts` makes them, since a method sees no data."""
