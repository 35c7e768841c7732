"""A candidate of a search, as the study knows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorica.search.space import Point

Outcome = Literal["waiting", "training", "finished", "cut", "failed"]


@dataclass(frozen=True)
class Entry:
    """What is known of one candidate.

    Attributes:
        number: of the candidate, counted from 0.
        point: its own settings.
        outcome: "cut" is ended early by comparison; "failed" could not be trained.
        run: the folder of the run that trains it; empty where nobody does.
        reason: why it was cut or failed.
        parameters, rank: how many numbers train, and `r`; None until it was attached, or without.
        curve: step -> evaluation loss (nats per token).
        best_step: the step of the adapter that is kept.
        losses: summed loss of each evaluation record with that adapter.
        rungs: step -> the same at the steps where candidates are compared.
        decided: step -> why it ended there; empty where it went on.
        newest: summed loss of each evaluation record at the last step of the curve.
        joined: turns of the search before its first step, where a schedule says when it joins.
        stopped: (turn, why) where it ended by itself, as far as the schedule has to hear of it.
    """

    number: int
    point: Point
    outcome: Outcome
    run: str = ""
    reason: str = ""
    parameters: int | None = None
    rank: int | None = None
    curve: Mapping[int, float] = field(default_factory=dict)
    best_step: int | None = None
    losses: tuple[float, ...] = ()
    rungs: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    decided: Mapping[int, str] = field(default_factory=dict)
    newest: tuple[float, ...] = ()
    joined: int | None = None
    stopped: tuple[int, str] | None = None

    @property
    def name(self) -> str:
        """Of its adapter."""
        return adapter_name(self.number)

    @property
    def last_step(self) -> int:
        return max(self.curve, default=0)

    @property
    def loss(self) -> float | None:
        """Evaluation loss of the adapter that is kept."""
        return self.curve.get(self.best_step) if self.best_step is not None else None


def adapter_name(number: int) -> str:
    """The name of a candidate's adapter."""
    return f"c{number:03d}"


_STATES: dict[str, Outcome] = {
    "WAITING": "waiting",
    "RUNNING": "training",
    "COMPLETE": "finished",
    "PRUNED": "cut",
    "FAIL": "failed",
}


def entry_of(trial: Any) -> Entry:
    """A trial of Optuna as what the study means by it."""
    known = trial.user_attrs
    kept, stopped = known.get("kept", {}), known.get("stopped")
    return Entry(
        number=trial.number,
        point=dict(known.get("point", {})),
        outcome=_STATES[trial.state.name],
        run=str(known.get("run", "")),
        reason=str(known.get("reason", "")),
        parameters=known.get("parameters"),
        rank=known.get("rank"),
        curve=dict(sorted(trial.intermediate_values.items())),
        best_step=kept.get("step"),
        losses=tuple(kept.get("losses", ())),
        rungs={step: tuple(losses) for step, losses in _by_step(known, "rung ").items()},
        decided=_by_step(known, "decided "),
        newest=tuple(known.get("newest", ())),
        joined=known.get("joined"),
        stopped=(int(stopped[0]), str(stopped[1])) if stopped else None,
    )


def _by_step(known: Mapping[str, Any], prefix: str) -> dict[int, Any]:
    """Attributes whose names end in a step, by that."""
    return {int(k.removeprefix(prefix)): v for k, v in known.items() if k.startswith(prefix)}
