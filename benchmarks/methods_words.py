"""The words of docs/methods.md that do not change with the figures, and what follows from code."""

from __future__ import annotations

from typing import Any

from lorica.files import peft_kinds, peft_prompts
from lorica.methods import WORDS, LoRA, Selective
from lorica.methods.method import becomes_weight
from lorica.methods.virtual import VirtualTokens

HEAD = """# Which method when

`lorica methods` lists them; `lorica train --method WORD` and `method: WORD` in YAML take any. This
page is written by `python benchmarks/methods.py --page` from `benchmarks/results/methods-*.json`,
which the same script measures: every method on the same records and steps.

**Read it with its limits.** The budget is small, so that every method can have it on a laptop: 200
training records, some tens of steps, one model of each kind, three seeds. Learning rates are tried
a factor of three apart, with one seed, and up to five of them. What needs long training (virtual
tokens, AdaLoRA's schedule, LISA) is at a disadvantage here, and nothing here says what a model of
seven billion parameters does.

- A **score** is the mean over seeds. Its interval is a bootstrap over test records and seeds
  together (4,000 draws), since both could have been others; three seeds make it a little narrow.
- **- LoRA** is the difference on the same drawn records. A star marks an interval without 0.
- **step** is CPU time, not wall time: others used the machine as well. Lorica's includes reading,
  encoding and writing the adapter. **start** is what is done once before the first step.
- **memory** is the peak of the process while it trains, with Python, torch and the base in it.
- **file** is the adapter's file of tensors, with the new classifier where there is one.
"""


def properties() -> list[str]:
    """What can be said without measuring: a table from the code."""
    lines = [
        "## What does not depend on the task",
        "",
        "| words | becomes a weight | PEFT reads the file | shares the fast product |",
        "|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for word, known in WORDS.items():
        method: Any = getattr(known, "method", known)
        key = (_merges(method), _read_by_peft(method), "yes" if _stacks(method) else "no")
        groups.setdefault(key, []).append(word)
    lines += [f"| {', '.join(words)} | {' | '.join(key)} |" for key, words in groups.items()]
    return [
        *lines,
        "",
        "What becomes a weight costs nothing once it is merged. What shares the fast product mixes "
        "by row and trains beside others in one matrix product; everything else is mixed and "
        "trained together as well, one adapter after the other.",
        "",
    ]


def _merges(method: Any) -> str:
    """The base's own parameters are copied, and a copy is a weight already."""
    return "yes" if issubclass(method, Selective) or becomes_weight(method) else "no"


def _read_by_peft(method: Any) -> str:
    known = {kind.method for kind in peft_kinds.KINDS.values()} | {*peft_prompts.KINDS.values()}
    return "yes" if issubclass(method, LoRA) or method in known else "no"


def _stacks(method: Any) -> bool:
    return not issubclass(method, VirtualTokens) and bool(getattr(method, "stacks", False))


ADVICE = """## In short

ADVICE
"""
