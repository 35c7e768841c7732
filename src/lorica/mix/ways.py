"""The ways to make one update of several, at one place.

What they take are the updates themselves (task vectors), as in the papers and in mergekit. PEFT's
`ties`, `dare_linear`, `dare_ties` and `magnitude_prune` work on the factors A and B apart instead,
and its names for what is meant here end in `_svd`; both names are known. `linear` alone mixes
factors, as it does there.

Legend: D_i the update of adapter i, w_i its weight, d the density.

    cat, task_arithmetic   sum_i w_i D_i, as stacked factors: exact
    svd                    the same, cut to a rank
    linear                 B A with A = sum_i sign(w_i) sqrt(|w_i s_i|) A_i, B = sum_i sqrt(..) B_i
    slerp                  on the great circle from D_1 to D_2
    magnitude_prune        sum_i w_i top_d(D_i)
    dare_linear            sum_i w_i drop_d(D_i) / d
    ties                   mean over those i that agree with the elected sign of w_i top_d(D_i)
    dare_ties              the same with drop_d(D_i) / d
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorica.errors import ConfigError, nearest
from lorica.mix.update import Update, total

NEARLY_PARALLEL = 0.9995
"""Cosine from which the great circle is taken as a line."""


@dataclass(frozen=True)
class Choices:
    """What a way may need beside updates and weights.

    Attributes:
        density: share of the elements that stays.
        majority_sign_method: "total": the sign of the sum; "frequency": that of most.
        generator: draws what DARE drops.
    """

    density: float = 1.0
    majority_sign_method: str = "total"
    generator: torch.Generator | None = None


Way = Callable[[Sequence[Update], Sequence[float], Choices], Update]


def exact(parts: Sequence[Update], weights: Sequence[float], choices: Choices) -> Update:
    """The weighted sum. Ilharco et al. 2023, "Editing Models with Task Arithmetic" (2212.04089)."""
    return total([part.times(w) for part, w in zip(parts, weights, strict=True)])


def linear(parts: Sequence[Update], weights: Sequence[float], choices: Choices) -> Update:
    """Factors summed apart, as PEFT does: the products of factors of different adapters come in
    beside the sum that was asked for.
    """
    ranks = {part.rank for part in parts}
    if len(ranks) > 1 or None in ranks:
        raise ConfigError(
            "linear sums the factors of adapters, so they must have some, and of one rank",
            expected=f"one rank, not {', '.join(str(r or 'no factors') for r in ranks)}",
            mend="choose cat, which is exact, or svd",
        )
    scaled = [part.scale * weight for part, weight in zip(parts, weights, strict=True)]
    A, B = 0.0, 0.0
    for part, scale in zip(parts, scaled, strict=True):
        assert part.A is not None and part.B is not None
        A = A + part.A * math.copysign(math.sqrt(abs(scale)), scale)
        B = B + part.B * math.sqrt(abs(scale))
    return Update(torch.as_tensor(A), torch.as_tensor(B), None)


def slerp(parts: Sequence[Update], weights: Sequence[float], choices: Choices) -> Update:
    """Between two updates along the great circle: sin((1 - t) a) / sin(a) D_1 + sin(t a) / sin(a)
    D_2, a the angle between them, t the second weight (Shoemake 1985, "Animating Rotation with
    Quaternion Curves"). A sum with other weights, so it is exact and keeps the factors.
    """
    if len(parts) == 1:  # a place of one of the two
        return exact(parts, weights, choices)
    one, two = parts
    norms = one.norm() * two.norm()
    cosine = one.dot(two) / norms if norms else 1.0
    if abs(cosine) > NEARLY_PARALLEL:
        return exact(parts, weights, choices)
    angle, t = math.acos(cosine), weights[1]
    turned = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    return exact(parts, turned, choices)


def magnitude_prune(parts: Sequence[Update], weights: Sequence[float], choices: Choices) -> Update:
    """The largest elements of every update, summed."""
    return _sum([_largest(part.matrix(), choices.density) for part in parts], weights)


def dare_linear(parts: Sequence[Update], weights: Sequence[float], choices: Choices) -> Update:
    """Elements dropped at random, the others made larger by as much; summed. Yu et al. 2024,
    "Language Models are Super Mario" (2311.03099).
    """
    return _sum([_drawn(part.matrix(), choices) for part in parts], weights)


def ties(parts: Sequence[Update], weights: Sequence[float], choices: Choices) -> Update:
    """Trim, elect a sign for every element, and take the mean of those that agree with it. Yadav et
    al. 2023, "TIES-Merging" (2306.01708); weights enter behind the election, as in PEFT.
    """
    kept = [_largest(part.matrix(), choices.density) for part in parts]
    return _agreeing(kept, weights, choices.majority_sign_method)


def dare_ties(parts: Sequence[Update], weights: Sequence[float], choices: Choices) -> Update:
    """DARE's dropping with the election of TIES, as in PEFT and mergekit."""
    kept = [_drawn(part.matrix(), choices) for part in parts]
    return _agreeing(kept, weights, choices.majority_sign_method)


WAYS: dict[str, Way] = {
    "cat": exact,
    "task_arithmetic": exact,
    "svd": exact,
    "linear": linear,
    "slerp": slerp,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}
ALSO = {f"{name}_svd": name for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune")}
"""PEFT's names for the ways that work on updates."""
DENSE = frozenset(ALSO.values())
"""Ways whose result is no thin product, so that a rank must be chosen for it."""
SAMPLED = frozenset({"dare_linear", "dare_ties"})


def find_way(name: str) -> str:
    """The way of this name. Raises ConfigError with the nearest one."""
    found = ALSO.get(name, name)
    if found not in WAYS:
        near = nearest(name, (*WAYS, *ALSO))
        raise ConfigError(
            f"there is no way to mix called {name!r}",
            expected=f"one of: {', '.join(WAYS)}",
            mend=f"did you mean {near}?" if near else None,
        )
    return found


def _sum(matrices: list[Tensor], weights: Sequence[float]) -> Update:
    stacked = torch.stack([m * w for m, w in zip(matrices, weights, strict=True)])
    return Update(None, None, stacked.sum(0))


def _largest(matrix: Tensor, density: float) -> Tensor:
    """The share `density` of the elements with the largest values; the others are zero."""
    count = int(density * matrix.numel())
    if count == matrix.numel():
        return matrix
    mask = torch.zeros(matrix.numel(), dtype=matrix.dtype, device=matrix.device)
    mask[matrix.abs().flatten().topk(count).indices] = 1
    return matrix * mask.view(matrix.shape)


def _drawn(matrix: Tensor, choices: Choices) -> Tensor:
    """Each element with the chance `density`, divided by it; else zero."""
    kept = torch.rand(matrix.shape, generator=choices.generator) < choices.density
    return matrix * kept.to(matrix) / choices.density


def _agreeing(kept: list[Tensor], weights: Sequence[float], majority: str) -> Update:
    stacked = torch.stack(kept)
    votes = stacked if majority == "total" else stacked.sign()
    elected = torch.where(votes.sum(0) >= 0, 1, -1)
    agree = stacked.sign() == elected
    weighted = torch.stack([m * w for m, w in zip(kept, weights, strict=True)])
    mean = (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)
    return Update(None, None, mean)
