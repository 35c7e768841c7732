"""What a search will need, before it begins: how many candidates at once, time, disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorica.cli.candidates import Candidates
from lorica.cli.forecast import Forecast
from lorica.cli.search_prepare import course_of, foresee_search, places_for, read_material
from lorica.cli.voice import Voice
from lorica.config import Resolved
from lorica.errors import BaseModelError
from lorica.records.phrases import count, duration, parameters, size
from lorica.search.samplers import number_of
from lorica.train.pace import Pace


def plan_search(
    settings: Resolved, voice: Voice, pace_of: Callable[[Forecast], Pace]
) -> dict[str, Any]:
    """The plan of a search as plain values.

    Args:
        pace_of: how fast a run is.

    Raises:
        LoricaError: settings, data or base with which no search can begin.
    """
    candidates = Candidates(settings)
    material, kind = read_material(candidates.settings, voice)
    ahead = foresee_search(candidates, material, kind, voice)
    if ahead is None:
        raise BaseModelError(
            f"the base {settings.run.model} cannot be planned with",
            mend="lorica search loads it and says why",
        )
    candidates, found = ahead.candidates, ahead.forecast
    number, (at_once, why) = number_of(candidates.space), places_for(candidates, found)
    total, rungs = course_of(candidates.settings, candidates.space, len(found.examples))
    with voice.work("timing a few steps"):
        pace = pace_of(found)
    train = candidates.settings.train
    records = train.batch_size * train.gradient_accumulation_steps
    per_epoch = -(-len(found.examples) // records)
    steps = round(total * number * share_of_steps(rungs, candidates.space.how.keep, total))
    tokens = found.examples.num_tokens * steps / per_epoch
    trained, kept = found.memory.adapter, train.save_total_limit
    checkpoint = number * trained + at_once * found.memory.optimizer
    return {
        "fits": found.fits,
        "candidates": number,
        "sampler": candidates.space.sampler,
        "at_once": at_once,
        "why": why,
        "largest": found.memory.total,
        "each": found.memory.phases["training"] - found.memory.weights - found.memory.process,
        "parameters": trained // 4 // (2 if train.keep_best else 1),
        "total_steps": total,
        "rungs": list(rungs),
        "steps": steps,
        "steps_without_cuts": total * number,
        "seconds": tokens / pace.tokens_per_second,
        "tokens_per_second": pace.tokens_per_second,
        "how": pace.how,
        "disk": number * trained + (kept + 1) * checkpoint,
    }


def share_of_steps(rungs: tuple[int, ...], keep: float, total: int) -> float:
    """The steps of a search over those of training every candidate to its end, where every rung
    cuts as it should.
    """
    alive, last, made = 1.0, 0, 0.0
    for step in (*rungs, total):
        made += alive * (step - last)
        alive, last = alive * keep, step
    return made / total


def lines_of(plan: dict[str, Any]) -> list[str]:
    """The same for people."""
    cut = f"; compared at step {', '.join(map(str, plan['rungs']))}" if plan["rungs"] else ""
    share = plan["steps"] / plan["steps_without_cuts"]
    return [
        f"candidates  {count(plan['candidates'])} ({plan['sampler']}), at most "
        f"{parameters(plan['parameters'])} parameters each",
        f"at once     {plan['at_once']} ({plan['why']})",
        f"memory      {size(plan['largest'])} with the largest of them; "
        f"{size(plan['each'])} more for each further one",
        f"steps       {count(plan['steps'])} in all, of {count(plan['total_steps'])} each{cut}: "
        f"{share:.0%} of training all of them to the end",
        f"time        {duration(plan['seconds'])} of training, "
        f"{count(plan['tokens_per_second'])} tokens/s ({plan['how']})",
        f"disk        {size(plan['disk'])} at most",
    ]
