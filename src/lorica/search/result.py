"""What a search found, as plain values: search.json, from which its page is made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorica.errors import TrainingError
from lorica.search.answer import (
    Answer,
    Judged,
    best_per_budget,
    choose,
    importance,
    paired,
)
from lorica.search.entry import Entry
from lorica.search.space import name_of
from lorica.search.spectra import Spectrum, suggested

Losses = Sequence[float]


@dataclass(frozen=True)
class CutTo:
    """What the trained adapter scores when its updates are cut.

    Attributes:
        rank: the largest rank of a layer.
        parameters: numbers that are left.
        losses: summed loss of each evaluation record.
        is_pattern: whether the layers have the ranks that were suggested for each.
    """

    rank: int
    parameters: int
    losses: Losses
    is_pattern: bool = False


@dataclass(frozen=True)
class OfSpectrum:
    """The spectrum of one candidate's updates, and the curve that it gives.

    Attributes:
        number: of the candidate.
        layers: the spectrum of each.
        cuts: by rising rank; the suggested pattern last.
    """

    number: int
    layers: Sequence[Spectrum]
    cuts: Sequence[CutTo] = ()


def answer_of(entries: Sequence[Entry], tokens: Sequence[int], errors: float) -> Answer:
    """The answer of a study.

    Raises:
        TrainingError: no candidate came to its end.
    """
    ended = [_judged(e) for e in entries if e.outcome == "finished" and e.losses]
    if not ended:
        problems = [f"{e.name} ({name_of(e.point)}): {e.outcome}, {e.reason}" for e in entries]
        raise TrainingError(
            "no candidate trained to its end, so there is nothing to choose from",
            problems=problems[:10],
            mend="search other values, such as a lower learning_rate",
        )
    return choose(ended, tokens, errors=errors)


def _judged(entry: Entry) -> Judged:
    name = name_of(entry.point)
    return Judged(entry.number, name, entry.parameters or 0, entry.rank, entry.losses)


def as_dict(
    entries: Sequence[Entry],
    tokens: Sequence[int],
    answer: Answer,
    spectrum: OfSpectrum | None = None,
) -> dict[str, Any]:
    """The answer with everything that it rests on, as JSON has it."""
    known = sum(tokens)
    points = [
        (e.number, e.parameters or 0, e.loss)
        for e in entries
        if e.outcome == "finished" and e.loss is not None
    ]
    step, values = importance_of(entries)
    found = answer.differences[answer.chosen.number]
    return {
        "sentence": answer.sentence(),
        "chosen": answer.chosen.number,
        "best": answer.best.number,
        "rule": {
            "standard_errors": answer.errors,
            "difference": found.difference,
            "error": found.error,
            "num_records": answer.num_records,
            "num_tokens": known,
        },
        "candidates": [_candidate(entry, answer) for entry in entries],
        "frontier": list(answer.frontier),
        "budgets": [
            {"parameters": budget, "candidate": number, "loss": loss}
            for budget, number, loss in best_per_budget(points)
        ],
        "importance": {"step": step, "settings": values},
        "spectrum": _spectrum(spectrum, entries, tokens) if spectrum else None,
    }


def importance_of(entries: Sequence[Entry]) -> tuple[int | None, dict[str, float]]:
    """(step, setting -> its share of the variance) at the last step that at least four candidates,
    and most of all that were evaluated, have reached.
    """
    seen = [entry for entry in entries if entry.curve]
    steps = sorted({step for entry in seen for step in entry.curve}, reverse=True)
    for step in steps:
        there = [entry for entry in seen if step in entry.curve]
        if len(there) >= 4 and len(there) == len([e for e in seen if e.outcome != "failed"]):
            points = [entry.point for entry in there]
            return step, importance(points, [entry.curve[step] for entry in there])
    return None, {}


def _candidate(entry: Entry, answer: Answer) -> dict[str, Any]:
    found = answer.differences.get(entry.number)
    return {
        "number": entry.number,
        "name": entry.name,
        "words": name_of(entry.point),
        "settings": entry.point,
        "outcome": entry.outcome,
        "reason": entry.reason,
        "run": entry.run,
        "rank": entry.rank,
        "parameters": entry.parameters,
        "loss": entry.loss,
        "best_step": entry.best_step,
        "steps": entry.last_step,
        "curve": [[step, loss] for step, loss in entry.curve.items()],
        "difference": found.difference if found else None,
        "error": found.error if found else None,
        "eligible": entry.number in answer.eligible,
    }


def _spectrum(
    spectrum: OfSpectrum, entries: Sequence[Entry], tokens: Sequence[int]
) -> dict[str, Any]:
    whole = next(entry for entry in entries if entry.number == spectrum.number)
    r, pattern = suggested(spectrum.layers)
    return {
        "candidate": spectrum.number,
        "rank": whole.rank,
        "layers": [
            {
                "path": one.path,
                **_place(one.path),
                "rank": one.rank,
                "effective": one.effective,
                "energy_90": one.energy_90,
                "energy_99": one.energy_99,
                "values": [float(f"{value:.4g}") for value in one.values],
            }
            for one in spectrum.layers
        ],
        "suggested": {"r": r, "rank_pattern": pattern},
        "cuts": [_cut(one, whole.losses, tokens) for one in spectrum.cuts],
    }


def _cut(one: CutTo, whole: Losses, tokens: Sequence[int]) -> dict[str, Any]:
    against = paired(one.losses, whole, tokens)
    return {
        "rank": one.rank,
        "is_pattern": one.is_pattern,
        "parameters": one.parameters,
        "loss": sum(one.losses) / sum(tokens),
        "difference": against.difference,
        "error": against.error,
    }


def _place(path: str) -> Mapping[str, str]:
    """The layer of a path ("-" without one) and the kind of module there."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", path)
    return {"layer": numbers[0] if numbers else "-", "kind": path.rpartition(".")[2]}
