"""What the weight of an adapter in a mixture may be: a number, numbers by place, a schedule.

    0.7                                        everywhere, always
    {"layers.[0-7]": 0.5, "lm_head": 0}        by place; 1 where nothing is said, or say "*"
    [1.0, 0.8, 0.6]                            by step: the last one stays
    lambda step: 0.9 ** step                   by step

A step is a forward pass of the model: one token of a text that is generated, one step of a
diffusion model's denoiser. A pass that begins a text, with an empty cache, is step 0 again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorica.errors import ActivationError, ConfigError
from lorica.methods.patterns import compiled

Steps = Sequence[float] | Callable[[int], float]
Amount = float | Steps
Weight = Amount | Mapping[str, Amount]
"""A number, a schedule, or either of them by place."""


def is_plain(weight: Weight) -> bool:
    """Whether it is one number for all places and steps."""
    return isinstance(weight, int | float)


def problem_of(weight: Any) -> str | None:
    """Why this is no weight."""
    if isinstance(weight, Mapping):
        found = [problem_of(w) for w in weight.values() if not isinstance(w, Mapping)]
        if not weight or any(isinstance(w, Mapping) for w in weight.values()):
            return f"is {weight!r}; by place it is written {{name or pattern: weight}}"
        return next(filter(None, found), None)
    if isinstance(weight, Sequence) and not isinstance(weight, str):
        bad = not weight or any(not _is_number(step) for step in weight)
        return f"is {weight!r}; a schedule is a list of finite numbers" if bad else None
    if callable(weight) or _is_number(weight):
        return None
    return f"is {weight!r}; it must be a finite number"


def at_place(weight: Weight, path: str) -> Amount:
    """The weight at a place: that of the first pattern that takes the place's path or that of a
    module around it; 1 where none does.
    """
    if not isinstance(weight, Mapping):
        return weight
    pattern = _deciding(weight, path)
    return 1.0 if pattern is None else weight[pattern]


def _deciding(patterns: Iterable[str], path: str) -> str | None:
    parts = path.split(".")
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return next((p for p in patterns if any(map(compiled(p, suffix=True).matches, around))), None)


def check_patterns(name: str, weight: Weight, paths: Iterable[str]) -> None:
    """Raises ConfigError for a pattern that decides no place of the adapter."""
    if not isinstance(weight, Mapping):
        return
    places = list(paths)
    used = {_deciding(weight, path) for path in places}
    if idle := [pattern for pattern in weight if pattern not in used]:
        raise ConfigError(
            f"weights of {name!r} are for places that it does not have, or that an earlier "
            f"pattern takes: {', '.join(map(repr, idle))}",
            expected="names or patterns of adapted layers or of blocks around them, such as "
            f"{places[0]!r}",
        )


def at_step(amount: Amount, step: int) -> float:
    """The number at a step. Raises ActivationError where a function gives none."""
    if isinstance(amount, int | float):
        return float(amount)
    if isinstance(amount, Sequence):
        return float(amount[min(step, len(amount) - 1)])
    found = amount(step)
    if not _is_number(found):
        raise ActivationError(
            f"a schedule gave {found!r} for step {step}", expected="a finite number"
        )
    return float(found)


@dataclass(eq=False)
class Schedule:
    """The weights of an activation that change from step to step.

    Attributes:
        tables: the weights (rows, N) or (N,) that sites read, and what each entry is; sites see
            the same tensor all the time, into which the numbers of the step are written.
        step: of the newest forward pass; -1 before there was one.
    """

    tables: list[tuple[Any, list[list[Amount]]]]
    step: int = -1
    _handle: RemovableHandle | None = field(default=None, repr=False)
    _time: float | None = field(default=None, repr=False)

    def start(self, model: nn.Module) -> None:
        """Count the forward passes of a model; of a text-to-image pipeline those of the denoiser,
        which the pipeline calls past the model.
        """
        if self._handle is None:
            denoiser: nn.Module | None = getattr(model, "denoiser", None)
            before = self._before if denoiser is None else self._before_denoising
            counted = model if denoiser is None else denoiser
            self._handle = counted.register_forward_pre_hook(before, with_kwargs=True, prepend=True)

    def stop(self) -> None:
        """Count no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def go_to(self, step: int) -> None:
        """Write the weights of a step."""
        self.step = step
        for route, entries in self.tables:
            rows = [[at_step(amount, step) for amount in row] for row in entries]
            route.weights.copy_(torch.tensor(rows if route.weights.dim() == 2 else rows[0]))
            route.__dict__.pop("table", None)

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        begins = cache is not None and _length(cache) == 0
        self.go_to(0 if begins else self.step + 1)

    def _before_denoising(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """All passes at one timestep are one step. Timesteps fall while a picture is drawn, so a
        greater one than the last is that of the next picture, which begins at 0.
        """
        given = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        time = None if given is None else float(torch.as_tensor(given).max())
        last, self._time = self._time, time
        if time is None or last is None or self.step < 0:
            self.go_to(self.step + 1)
        elif time != last:
            self.go_to(0 if time > last else self.step + 1)


def _length(cache: Any) -> int:
    """Tokens in a cache of keys and values; -1 where it does not say."""
    count = getattr(cache, "get_seq_length", None)
    return int(count()) if count is not None else -1


def table_of(entries: list[list[Amount]]) -> Tensor:
    """The weights of step 0, (rows, N)."""
    return torch.tensor([[at_step(amount, 0) for amount in row] for row in entries])


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)
