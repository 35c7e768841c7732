"""Say which adapters act: for all rows, for each row, for a while or for good."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lorica.attach.handle import Adapter, adapters, attached_to
from lorica.attach.plates import Plates, Route, plates_of
from lorica.attach.survey import unwrap
from lorica.attach.weights import (
    Amount,
    Schedule,
    Weight,
    at_place,
    check_patterns,
    is_plain,
    problem_of,
    table_of,
)
from lorica.errors import ActivationError, ConfigError, nearest


@dataclass(frozen=True, init=False)
class Stack:
    """Adapters that follow each other, for `activate`: at every layer each is given what the one
    before it made of the output (Pfeiffer et al. 2020, arXiv 2005.00052).

    Attributes:
        adapters: names or handles, the first nearest to the base.
    """

    adapters: tuple[str | Adapter, ...]

    def __init__(self, *adapters: str | Adapter) -> None:
        object.__setattr__(self, "adapters", adapters)


Mixture = str | Adapter | Mapping[str, Weight] | Mapping[Adapter, Weight] | None
"""One adapter, several by weight, or none: the base."""


class Activation:
    """What `activate` returns. In force from the call on; as a context it ends with the block."""

    def __init__(
        self,
        model: nn.Module,
        route: Route | None,
        routes: Mapping[str, Route] | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        """`routes`: those of places that have another one than `route`."""
        self._plates: list[Plates] = [p for m in model.modules() for p in plates_of(m)]
        self._status = attached_to(model).status
        self._before = [(p.route, p.recorded) for p in self._plates]
        self._model, self._adapters_before = model, adapters(model)
        self._owner_before = self._status.owner
        thread = threading.get_ident()
        running = {other.ident for other in threading.enumerate()}
        if self._status.owner != thread and self._status.owner in running:
            raise ActivationError(
                "adapters of this model are active in another thread, whose answers would change",
                mend="use a model from one thread, or give every row of a batch its own entry",
            )
        self.route, self.schedule = route, schedule
        self._schedule_before = self._status.schedule
        self._status.owner = None if route is None else thread
        self._status.decided = True
        for plates in self._plates:
            plates.route = (routes or {}).get(plates.path, route)
            plates.recorded = None
        self._follow(schedule)

    def __enter__(self) -> Activation:
        return self

    def restart(self) -> None:
        """Let the next forward pass be step 0 of the schedules. A text that is generated with a
        cache does so by itself.
        """
        if self.schedule is not None:
            self.schedule.step = -1

    def _follow(self, schedule: Schedule | None) -> None:
        """Let this schedule count the steps, and no other one."""
        if self._status.schedule is not None:
            self._status.schedule.stop()
        self._status.schedule = schedule
        if schedule is not None:
            schedule.start(unwrap(self._model))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stale = self._stale()
        for plates, (route, recorded) in zip(self._plates, self._before, strict=True):
            ended = route is not None and not stale.isdisjoint(route.names)
            plates.route = None if ended else route
            if ended:
                self._owner_before = None
            elif plates.recorded is None:  # nothing here can be recomputed, so what was counts
                plates.recorded = recorded
        self._status.owner = self._owner_before
        self._follow(None if stale else self._schedule_before)

    def _stale(self) -> set[str]:
        """The adapters that were detached since. Another one of the same name does not step in."""
        now = adapters(self._model)
        return {name for name, own in self._adapters_before.items() if now.get(name) is not own}


def activate(model: nn.Module, mixture: Mixture | Sequence[Mixture] | Stack) -> Activation:
    """Let adapters act on everything that `model` computes from now on.

    Args:
        mixture: a name or handle; `{"sql": 0.7, "style": 0.3}` for the weighted sum of their
            updates, which is exact; None for the bare base. A list gives one such entry per row of
            the batch. An adapter that lies on another one brings that in with its own weight.
            `Stack("language", "task")` for adapters that follow each other.
            A weight may be negative. It may differ by place, `{"style": {"layers.0": 0.5,
            "mlp": 0}}`: names or patterns of layers or of blocks around them, the first that fits
            counts, and 1 where none does. And it may change from step to step, a step being a
            forward pass (a token of a text, a step of a denoiser): `{"style": [1, 0.5, 0]}`, whose
            last number stays, or a function of the number of the step.

    Returns:
        an object that is also a context manager: `with activate(model, "sql"): ...` puts back what
            was
        active before; without `with` it stays.

    Raises:
        ConfigError: an unknown name, a weight that is no finite number, or a list without rows.
        ActivationError: the model is in use by another thread.
    """
    if mixture is None:
        return Activation(model, None)
    if isinstance(mixture, Stack):
        return Activation(model, _stack_route(model, mixture))
    rows = list(mixture) if isinstance(mixture, Sequence) and not isinstance(mixture, str) else None
    if rows == []:
        raise ConfigError("this activation is not possible", problems=["the list has no rows"])
    entries = [_weights(entry) for entry in (rows if rows is not None else [mixture])]  # pyright: ignore
    names = tuple(dict.fromkeys(name for entry in entries for name in entry))
    _check(model, names, entries)
    if any(adapters(model)[name].stacked for name in names):
        if rows is None and len(names) == 1 and entries[0][names[0]] == 1.0:
            return Activation(model, _stack_route(model, Stack(*names)))
        raise ActivationError(
            "an adapter that is stacked on another one acts on all rows, whole and by itself",
            mend="activate it alone, by its name",
        )
    entries = [with_stages(model, entry) for entry in entries]
    acting = {name for entry in entries for name in entry}
    names = tuple(
        name for name in adapters(model) if name in acting
    )  # one order: fewer compilations
    if rows is None and len(names) == 1 and entries[0][names[0]] == 1.0:
        return Activation(model, Route(names))
    if not names:
        return Activation(model, None)
    amounts = [[entry.get(name, 0.0) for name in names] for entry in entries]
    if all(is_plain(weight) for row in amounts for weight in row):
        return Activation(model, _route(model, names, amounts, by_row=rows is not None))
    return _varied(model, names, amounts, by_row=rows is not None)


def _route(
    model: nn.Module, names: tuple[str, ...], amounts: list[list[Amount]], *, by_row: bool
) -> Route:
    """One route with these weights, on the device of the adapters."""
    slots = (slot for name in names for slot in adapters(model)[name].slots.values())
    device = next((t.device for slot in slots for t in slot.tensors.values()), None)
    table = table_of(amounts).to(device)
    return Route(names, table if by_row else table[0])


def _varied(
    model: nn.Module, names: tuple[str, ...], weights: list[list[Weight]], *, by_row: bool
) -> Activation:
    """Weights that differ by place or change by step: a route for every set of them."""
    known = adapters(model)
    for row in weights:
        for name, weight in zip(names, row, strict=True):
            check_patterns(name, weight, known[name].slots)
    routes: dict[str, Route] = {}
    made: dict[tuple, tuple[Route, list[list[Amount]]]] = {}
    for path in dict.fromkeys(path for name in names for path in known[name].slots):
        amounts = [[at_place(weight, path) for weight in row] for row in weights]
        key = tuple(a if isinstance(a, int | float) else id(a) for row in amounts for a in row)
        if key not in made:
            made[key] = _route(model, names, amounts, by_row=by_row), amounts
        routes[path] = made[key][0]
    changing = [
        (route, amounts)
        for route, amounts in made.values()
        if not all(is_plain(amount) for row in amounts for amount in row)
    ]
    first = next(iter(routes.values()))
    return Activation(model, first, routes, Schedule(changing) if changing else None)


def _stack_route(model: nn.Module, stack: Stack) -> Route:
    """The route of a stack, with what lies below its adapters."""
    given = [one.name if isinstance(one, Adapter) else one for one in stack.adapters]
    _check(model, tuple(given), [dict.fromkeys(given, 1.0)])
    stages = [stage for name in given for stage in adapters(model)[name].stages]
    names = tuple(dict.fromkeys(stage.name for stage in stages))
    summed = [one.name for one in stages if one.on is not None and not one.stacked]
    problems = [f"{name!r} is no sum with others any more in a stack" for name in summed]
    if len(names) < len(stages) or len(names) < 2:
        problems.append("a stack needs at least two different adapters")
    if problems:
        raise ConfigError("this stack is not possible", problems=problems)
    held = (t for one in stages for slot in one.slots.values() for t in slot.tensors.values())
    device = next((t.device for t in held), None)
    return Route(names, torch.ones(len(names), device=device), stacked=True)


def with_stages(model: nn.Module, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A mixture with the adapters below its own, which take part with the same weights.

    Raises:
        ConfigError: one lies below two others, and their weights are no numbers that have a sum.
    """
    found: dict[str, Any] = {}
    for name, weight in entry.items():
        for stage in adapters(model)[name].stages:
            if stage.name not in found:
                found[stage.name] = weight
            elif is_plain(weight) and is_plain(found[stage.name]):
                found[stage.name] += weight
            else:
                raise ConfigError(
                    f"{stage.name!r} takes part twice, and weights by place or step have no sum",
                    mend="give the adapters that lie on it numbers",
                )
    return found


def _weights(entry: Mixture) -> dict[str, Any]:
    if entry is None:
        return {}
    if isinstance(entry, Adapter):
        return {entry.name: 1.0}
    if isinstance(entry, str):
        return {entry: 1.0}
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f"{entry!r} is no mixture",
            expected="a name, a handle, {name: weight}, None, or a list of these",
        )
    return {key.name if isinstance(key, Adapter) else key: weight for key, weight in entry.items()}


def _check(model: nn.Module, names: tuple[str, ...], entries: list[dict[str, Any]]) -> None:
    known = adapters(model)
    single = len(entries) == 1
    problems = []
    for name in names:
        if name not in known:
            near = nearest(name, known)
            problems.append(
                f"no adapter {name!r} is attached" + (f"; did you mean {near!r}?" if near else "")
            )
    for row, entry in enumerate(entries):
        for name, weight in entry.items():
            if (wrong := problem_of(weight)) is not None:
                where = "" if single else f"row {row}: "
                problems.append(f"{where}the weight of {name!r} {wrong}")
    if problems:
        raise ConfigError(
            "this activation is not possible",
            expected=f"adapters: {', '.join(known) or 'none'}",
            problems=problems,
        )
