"""AdaLoRA: a product in the form of a singular value decomposition, whose ranks are given out anew
in training to the places that need them most.

    D = s P diag(E) Q        P is called B, Q is called A; s = lora_alpha / init_r

Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (ICLR 2023,
arXiv 2303.10512). The loss has a part that keeps P and Q orthogonal (equation 4; as in PEFT it is
the mean over all matrices of the norm, which the paper squares and sums). A triplet is a
singular value with its two vectors, and counts as much as its entries do (equations 7 to 10): each
by sensitivity, |entry times gradient|, times its uncertainty, both as running means.

    budget(t) = all ranks                                  t <= tinit
              = b + (all - b) (1 - (t - tinit) / (T - tinit - tfinal))^3
              = b = target_r times the number of places    t >= T - tfinal

The triplets beyond the budget, the least important of all places together, have their singular
value set to 0. What is 0 in the end is cut off when the run is over, so places differ in rank, and
where nothing is left the adapter gives the place up.

Legend: I in features, O out features, R rank, T steps of the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from lorica.methods.between import Between, Held
from lorica.methods.method import Layer, Method, Tensors, numeric_problems, setting, state
from lorica.methods.patterns import pattern_value
from lorica.methods.placed import rank_problems, scale_problems
from lorica.methods.update import WeightUpdate, matrix_shape
from lorica.ops.lora import Segment, lora_embedding, lora_linear

STEADY = 1e-5
"""Is added to the rank that the scale is divided by, as in PEFT."""


@dataclass(frozen=True)
class AdaLoRA(WeightUpdate):
    """Settings and arithmetic of AdaLoRA. The field names are PEFT's, but for `kept_r`;
    `delta_t`, which is deltaT there; and the two betas, which are beta1 and beta2 there and would
    be taken for AdamW's here.
    """

    init_r: int = setting(12, "rank at every place before the budget falls")
    target_r: int = setting(8, "mean rank of the places at the end")
    lora_alpha: float = setting(16, "the update is scaled by lora_alpha / init_r")
    lora_dropout: float = setting(0.0, "share of a layer's input dropped before A, in training")
    tinit: int | None = setting(
        None, "steps before the budget falls; null: a tenth of all (9 to 18 % in the paper)"
    )
    tfinal: int | None = setting(
        None, "steps at the end with fixed ranks; null: half of all (44 to 58 % in the paper)"
    )
    delta_t: int = setting(1, "ranks are given out anew every so many steps")
    sensitivity_beta: float = setting(0.85, "decay of the running mean of sensitivity")
    uncertainty_beta: float = setting(0.85, "decay of the running mean of its uncertainty")
    orth_reg_weight: float = setting(
        0.5, "weight in the loss of what keeps the singular vectors orthogonal"
    )
    rank_pattern: Mapping[str, int] = setting(
        {}, "ranks that are decided already: {suffix or pattern: at most init_r}"
    )
    kept_r: int | None = state(None)
    """The rank where rank_pattern names none; None: init_r."""

    kind: ClassVar[str] = "adalora"
    title: ClassVar[str] = "LoRA that gives its ranks to where they count (arXiv 2303.10512)"
    proposes: ClassVar[Mapping[str, Any]] = {"learning_rate": 2e-3}
    """All three factors begin small, so steps move the weight less than LoRA's: the paper has 5e-4
    to 2.2e-3 in thousands of steps (table 8)."""
    stacks: ClassVar[bool] = True

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @property
    def scale(self) -> float:
        """What multiplies the product; it stays when ranks are cut off."""
        return self.lora_alpha / (self.init_r + STEADY)

    @property
    def rank(self) -> int:
        """Of one place."""
        return self.init_r if self.kept_r is None else self.kept_r

    def at(self, path: str) -> Self:
        rank = pattern_value(self.rank_pattern, path)
        return replace(self, kept_r=self.kept_r if rank is None else rank, rank_pattern={})

    def problems(self, layer: Layer) -> list[str]:
        if layer.kind == "experts":
            return ["adalora cuts ranks off, and the experts of a stack must have the same"]
        if found := super().problems(layer):
            return found
        smallest = min(matrix_shape(layer)[-2:])
        if self.rank > smallest:
            return [f"init_r={self.rank} is more than the layer's own rank of at most {smallest}"]
        return []

    def start(self, layer: Layer, generator: torch.Generator) -> Tensors:
        rows, columns = matrix_shape(layer)
        A = torch.randn(self.rank, columns, generator=generator) * 0.02
        B = torch.randn(rows, self.rank, generator=generator) * 0.02
        return {"A": A, "B": B, "E": torch.zeros(self.rank, 1)}

    def matrix(self, tensors: Tensors, layer: Layer) -> Tensor:
        return (tensors["B"] @ (tensors["A"] * tensors["E"])) * self.scale

    def apply(self, x: Tensor, y: Tensor, tensors: Tensors, layer: Layer) -> Tensor:
        if layer.kind == "linear":
            return lora_linear(x, y.clone(), [self.segment(tensors)])
        if layer.kind == "embedding":
            A, B = tensors["A"] * tensors["E"], tensors["B"]
            return lora_embedding(x, y, A, B, self.scale * layer.output_scale)
        return super().apply(x, y, tensors, layer)

    def segment(self, tensors: Tensors, start: int = 0, end: int | None = None) -> Segment:
        """The fast path of linear layers: these factors for rows `start` to `end`."""
        return Segment(start, end, tensors["A"] * tensors["E"], tensors["B"], scale=self.scale)

    def between(self, held: Held, *, total: int, seed: int) -> Allocation:
        """The allocation of ranks in a run of `total` steps."""
        return Allocation(self, held, total)

    def _problems(self) -> list[str]:
        ranges = {"lora_dropout": (0.0, 0.99), "orth_reg_weight": (0.0, 1e4)}
        found = rank_problems("init_r", self.init_r) + rank_problems("target_r", self.target_r)
        found += scale_problems("lora_alpha", self.lora_alpha) + numeric_problems(self, ranges)
        found += rank_problems("delta_t", self.delta_t)
        for name in ("sensitivity_beta", "uncertainty_beta"):
            found += numeric_problems(self, {name: (1e-6, 1 - 1e-6)})
        for name in ("tinit", "tfinal"):
            if getattr(self, name) is not None:
                found += numeric_problems(self, {name: (0, 2**31)})
        if found:
            return found
        if self.target_r > self.init_r:
            found.append(f"target_r is {self.target_r}; it must be at most init_r={self.init_r}")
        decided: dict[str, Any] = {f"rank_pattern[{k!r}]": r for k, r in self.rank_pattern.items()}
        decided |= {} if self.kept_r is None else {"kept_r": self.kept_r}
        for name, rank in decided.items():
            found += rank_problems(name, rank)
            if isinstance(rank, int) and rank > self.init_r:
                found.append(f"{name} is {rank}; it must be at most init_r={self.init_r}")
        return found


class Allocation(Between):
    """Gives out the ranks of one adapter.

    Its state: for every tensor two running means, "PATH.A|sensitivity" and "PATH.A|uncertainty",
    until the ranks are decided; from then on "PATH|kept" (R,), which triplets stay.
    """

    def __init__(self, method: AdaLoRA, held: Held, total: int) -> None:
        super().__init__()
        self.method, self.total = method, total
        self.held = {path: cast(Tensors, t) for path, (m, t) in held.items() if m.kind == "adalora"}
        self.tinit = total // 10 if method.tinit is None else method.tinit
        self.tfinal = total // 2 if method.tfinal is None else method.tfinal
        self.all_ranks = sum(len(tensors["E"]) for tensors in self.held.values())
        self.target = method.target_r * len(self.held)

    @property
    def decided(self) -> int:
        """The step after which the ranks are fixed."""
        return self.total - self.tfinal

    def problems(self) -> list[str]:
        if self.tinit < self.decided:
            return []
        return [
            f"tinit={self.tinit} and tfinal={self.tfinal} leave none of the {self.total} steps for "
            "the budget to fall in"
        ]

    def note(self) -> str | None:
        end, target = self.decided, min(self.target, self.all_ranks)
        return (
            f"{self.all_ranks} ranks become {target} between steps {self.tinit} and {end}; "
            f"evaluations before step {end} choose no best"
        )

    def budget(self, step: int) -> int:
        """Ranks of all places together that stay after `step` steps."""
        if step <= self.tinit:
            return self.all_ranks
        if step > self.decided:
            return self.target
        left = 1 - (step - self.tinit) / (self.decided - self.tinit)
        return int((self.all_ranks - self.target) * left**3 + self.target)

    def penalty(self) -> Tensor | None:
        if not self.method.orth_reg_weight:
            return None
        products = []
        for tensors in self.held.values():
            A, B = tensors["A"], tensors["B"]
            products += [A @ A.T, B.T @ B]
        norms = [torch.linalg.matrix_norm(p - torch.eye(len(p)).to(p)) for p in products]
        return self.method.orth_reg_weight * torch.stack(norms).mean()

    @torch.no_grad()
    def after(self, step: int) -> None:
        if step < self.decided:
            self._weigh()
            if step > self.tinit and step % self.method.delta_t == 0:
                self._allocate(step)
        elif all(f"{path}|kept" in self.state for path in self.held):
            self._mask({path: self.state[f"{path}|kept"] for path in self.held})
        else:
            self.state = {f"{path}|kept": kept for path, kept in self._allocate(step).items()}

    def settled(self, step: int) -> bool:
        return step >= self.decided

    def kept_bytes(self) -> int:
        tensors = [tensor for own in self.held.values() for tensor in own.values()]
        return 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def finished(self) -> tuple[Method, Held] | None:
        kept = {path: tensors["E"].detach().flatten() != 0 for path, tensors in self.held.items()}
        ranks = {path: int(own.sum()) for path, own in kept.items()}
        if sum(ranks.values()) in (0, self.all_ranks):
            return None
        method = replace(
            self.method, rank_pattern=exact_ranks(ranks, self.method.init_r), kept_r=None
        )
        return method, {path: _cut(method, path, self.held[path], kept[path]) for path in ranks}

    def _weigh(self) -> None:
        """Equations 7 to 9. The parameters are those after the step, as in the authors' code."""
        beta1, beta2 = self.method.sensitivity_beta, self.method.uncertainty_beta
        for path, tensors in self.held.items():
            for name, tensor in tensors.items():
                if tensor.grad is None:
                    continue
                now = (tensor * tensor.grad).abs()
                mean = self._running(f"{path}.{name}|sensitivity", tensor)
                mean.mul_(beta1).add_(now, alpha=1 - beta1)
                spread = self._running(f"{path}.{name}|uncertainty", tensor)
                spread.mul_(beta2).add_((now - mean).abs_(), alpha=1 - beta2)

    def _running(self, key: str, like: Tensor) -> Tensor:
        """A running mean, from 0."""
        if key not in self.state:
            self.state[key] = torch.zeros_like(like)
        return self.state[key]

    def _allocate(self, step: int) -> dict[str, Tensor]:
        """Set the singular values beyond the budget to 0; returns which triplets stay."""
        scores = {path: self._scores(path) for path in self.held}
        surplus = self.all_ranks - self.budget(step)
        if surplus < 1:
            return {path: torch.ones_like(own, dtype=torch.bool) for path, own in scores.items()}
        threshold = torch.cat(list(scores.values())).kthvalue(surplus).values
        kept = {path: own > threshold for path, own in scores.items()}
        self._mask(kept)
        return kept

    def _mask(self, kept: Mapping[str, Tensor]) -> None:
        for path, own in kept.items():
            self.held[path]["E"].masked_fill_(~own.unsqueeze(1), 0.0)

    def _scores(self, path: str) -> Tensor:
        """Importance of the triplets of one place, (R,): equation 10."""
        A, B, E = (self._score(f"{path}.{name}", self.held[path][name]) for name in "ABE")
        return E.flatten() + (A.mean(1) + B.mean(0))

    def _score(self, key: str, tensor: Tensor) -> Tensor:
        if f"{key}|sensitivity" not in self.state:
            return torch.zeros_like(tensor)
        return self.state[f"{key}|sensitivity"] * self.state[f"{key}|uncertainty"]


def exact_ranks(ranks: Mapping[str, int], init_r: int) -> dict[str, int]:
    """Ranks of places (of which none has 0) as a `rank_pattern`."""
    names = {path.removesuffix(".weight"): r for path, r in ranks.items()}
    return {_exact(name, names): r for name, r in names.items() if r not in (0, init_r)}


def _exact(path: str, paths: Iterable[str]) -> str:
    """A pattern that matches this path alone: itself, unless another one ends with it."""
    ambiguous = any(other.endswith(f".{path}") for other in paths)
    return f"^{re.escape(path)}" if ambiguous else path


def _cut(
    method: AdaLoRA, path: str, tensors: Tensors, kept: Tensor
) -> tuple[AdaLoRA, Mapping[str, Tensor]]:
    """Settings and tensors of a place without the triplets that are 0."""
    if not kept.any():
        return method, {}
    A, B, E = tensors["A"], tensors["B"], tensors["E"]
    return method.at(path.removesuffix(".weight")), {"A": A[kept], "B": B[:, kept], "E": E[kept]}
