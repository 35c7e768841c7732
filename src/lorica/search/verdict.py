"""Whether a candidate goes on after an evaluation, by what the study holds, without chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorica.search.answer import paired
from lorica.search.entry import Entry
from lorica.search.halving import AtRung, cut_at, is_hopeless
from lorica.search.space import SearchSettings

Decided = Callable[[Entry, int], str | None]
"""What was decided about a candidate at a step: why it ended, or ""; None where nothing was."""


def verdict(
    own: Entry,
    entries: Sequence[Entry],
    step: int,
    *,
    how: SearchSettings,
    rungs: Sequence[int],
    total: int,
    tokens: Sequence[int],
    decided: Decided = lambda entry, step: entry.decided.get(step),
) -> str:
    """Why a candidate ends after an evaluation; empty where it goes on.

    Args:
        own: the candidate, which was evaluated at this step and no later one.
        entries: all of them, as they are at that turn of the search.
        rungs, total: steps at which candidates are compared, and of a whole run.
        tokens: trained tokens of each evaluation record.
    """
    if step in rungs:
        there = [e for e in entries if step in e.rungs and e.parameters is not None]
        taken = {e.number: decided(e, step) for e in there if e.number != own.number}
        known = {number: bool(reason) for number, reason in taken.items() if reason is not None}
        rung = [AtRung(e.number, e.rungs[step], e.parameters or 0) for e in there]
        ends = cut_at(rung, tokens, keep=how.keep, errors=how.standard_errors, decided=known)
        if ends[own.number]:
            return f"not among the best {how.keep:.0%} of {len(there)} at step {step}"
    others = [e for e in entries if e.loss is not None and e.losses and e.number != own.number]
    if not how.hopeless or not others:
        return ""
    best = min(others, key=lambda e: (e.loss, e.number))
    margin = how.standard_errors * paired(own.newest, best.losses, tokens).error
    lowest = best.loss or 0.0
    if not is_hopeless(own.curve, total, lowest, margin=margin):
        return ""
    return (
        f"its evaluation loss of {own.curve[step]:.4f} at step {step} falls too slowly to "
        f"come near the {lowest:.4f} of another one"
    )
