"""Where candidates come from: every point of the lists, chance, or a sampler of Optuna."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Any

from lorica.config.text import yaml_text
from lorica.search.space import Choices, Point, Space, choices_of

FIXED = ("grid", "random")
"""Samplers that need no results to find all candidates."""

USUAL = 16
"""Candidates where nothing says how many."""

_TRIES = 50
"""Draws per candidate before a small space counts as exhausted."""


def number_of(space: Space) -> int:
    """How many candidates a search has at most."""
    limit = space.how.candidates
    if space.sampler == "grid":
        return len(grid(space)[:limit])
    return limit or USUAL


def fixed_points(space: Space, seed: int) -> list[Point] | None:
    """All candidates of a search that needs no results to find them; None where it does."""
    if space.sampler == "grid":
        return grid(space)[: space.how.candidates]
    if space.sampler == "random":
        return drawn(space, space.how.candidates or USUAL, seed)
    return None


def grid(space: Space) -> list[Point]:
    """Every combination, the last axis changing fastest, none twice."""
    combined = itertools.product(*choices_of(space.axes))
    return _distinct(
        space.settle(dict(zip(space.keys, values, strict=True))) for values in combined
    )


def drawn(space: Space, count: int, seed: int) -> list[Point]:
    """Points by chance, none twice; fewer where the space has no more."""
    rng = random.Random(f"lorica search {seed}")
    found: list[Point] = []
    for _ in range(_TRIES * count):
        point = {
            axis.key: rng.choice(axis.values)
            if isinstance(axis, Choices)
            else axis.at(rng.random())
            for axis in space.axes
        }
        found = _distinct([*found, space.settle(point)])
        if len(found) == count:
            break
    return found


def suggested(space: Space, trial: Any, given: Point | None = None) -> Point:
    """The point that a sampler of Optuna proposes, or that a trial was given.

    Args:
        trial: `optuna.Trial`.
        given: the point that it was enqueued with.
    """
    point: Point = {}
    for axis in space.axes:
        if given is not None and axis.key not in given:
            continue  # its method does not take that
        if isinstance(axis, Choices):
            label = trial.suggest_categorical(axis.key, axis.labels)
            point[axis.key] = axis.values[axis.labels.index(label)]
        elif axis.whole:
            how = {"log": axis.log}
            point[axis.key] = trial.suggest_int(axis.key, int(axis.low), int(axis.high), **how)
        else:
            value = trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log)
            point[axis.key] = float(f"{value:.6g}")
    return space.settle(point)


def _distinct(points: Iterable[Point]) -> list[Point]:
    return list({yaml_text(point): point for point in points}.values())
