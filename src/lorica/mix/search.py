"""The weights of a mixture that answer some examples best, found without gradients.

    minimise loss(w) + penalty sum_i |w_i|        low <= w_i <= high

Huang et al. 2023, "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition"
(arXiv 2307.13269), with their penalty and bounds. They search with a toolbox of optimizers and mix
the factors apart; here the simplex of Nelder and Mead walks over the exact sum, which costs a
forward pass over the examples for every point and no arithmetic on weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from torch import nn

from lorica.attach.activate import activate
from lorica.errors import ConfigError
from lorica.tasks.task import Task

PENALTY, BOUND, STEPS = 0.05, 1.5, 40


@dataclass(frozen=True)
class FoundWeights:
    """What a search found.

    Attributes:
        weights: adapter -> weight.
        loss: there, without the penalty, nats per token.
        before: at the weights that the search began with.
        base: with weights of zero.
        tried: number of points.
    """

    weights: Mapping[str, float]
    loss: float
    before: float
    base: float
    tried: int

    def __str__(self) -> str:
        mixture = ", ".join(f"{name} x {weight:.3f}" for name, weight in self.weights.items())
        return (
            f"{mixture}: loss {self.loss:.4f} on the examples, after {self.tried} points; "
            f"{self.before:.4f} at the beginning, {self.base:.4f} of the base"
        )


def search_weights(
    model: nn.Module,
    names: Sequence[str],
    task: Task,
    records: Sequence[dict],
    *,
    start: Sequence[float] | None = None,
    penalty: float = PENALTY,
    bound: float = BOUND,
    steps: int = STEPS,
    batch_size: int = 16,
) -> FoundWeights:
    """The weights with which the exact mixture of attached adapters answers `records` best.

    Args:
        names: of the adapters.
        start: weights to begin with; None: all alike, with the sum 1.
        penalty: of the sum of the sizes of the weights, so that what does not help goes to zero.
        bound: largest size of a weight.
        steps: points that are tried at most.

    Raises:
        ConfigError: there are no records, or fewer steps than the simplex has corners.
    """
    if not records or steps < len(names) + 2:
        raise ConfigError(
            "there is nothing to search with",
            expected=f"records, and at least {len(names) + 2} steps for {len(names)} adapters",
        )
    first = np.array(start if start is not None else [1 / len(names)] * len(names), dtype=float)
    losses: dict[tuple[float, ...], float] = {}

    def loss(weights: Sequence[float]) -> float:
        point = tuple(float(weight) for weight in weights)
        if point not in losses:
            with activate(model, dict(zip(names, point, strict=True))):
                said = task.predict(model, records, batch_size=batch_size, generate=False)
            losses[point] = sum(one.nll for one in said) / sum(one.num_tokens for one in said)
        return losses[point]

    corners = np.vstack([first, *(first + 0.5 * unit for unit in np.eye(len(names)))])
    minimize(
        lambda weights: loss(weights) + penalty * float(np.abs(weights).sum()),
        first,
        method="Nelder-Mead",
        bounds=[(-bound, bound)] * len(names),
        options={"maxfev": steps, "initial_simplex": corners.clip(-bound, bound)},
    )
    best = min(losses, key=lambda point: losses[point] + penalty * sum(map(abs, point)))
    found = dict(zip(names, best, strict=True))
    before, tried = losses[tuple(float(w) for w in first)], len(losses)
    return FoundWeights(found, losses[best], before, loss([0.0] * len(names)), tried)
