"""The words of docs/methods.md that do not change with the figures, and what follows from code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorica.config.settings import Union
from lorica.files import peft_methods, peft_prompts
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
        if isinstance(known, Union):  # several methods in one
            continue
        method: Any = getattr(known, "method", known)
        key = (_merges(method), _read_by_peft(method), "yes" if _stacks(method) else "no")
        groups.setdefault(key, []).append(word)
    lines += [f"| {', '.join(words)} | {' | '.join(key)} |" for key, words in groups.items()]
    several = "; ".join(
        f"`{word}`: {', '.join(part for part, _ in known.parts)}"
        for word, known in WORDS.items()
        if isinstance(known, Union)
    )
    return [
        *lines,
        "",
        f"Words for several methods in one adapter: {several}.",
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
    known = {kind.method for kind in peft_methods.KINDS.values()} | {*peft_prompts.KINDS.values()}
    return "yes" if issubclass(method, LoRA) or method in known else "no"


def _stacks(method: Any) -> bool:
    return not issubclass(method, VirtualTokens) and bool(getattr(method, "stacks", False))


def advice(found: Mapping[str, Any], base_loss: float) -> list[str]:
    """What follows from the figures, with those that it follows from.

    Args:
        found: task -> figures; of "sst2" and "e2e".
        base_loss: of the base alone on all test records of E2E.
    """
    e2e, sst2 = found["e2e"]["methods"], found["sst2"]["methods"]

    def side(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        return table[name]["sides"]["lorica"]

    def score(table: Mapping[str, Any], *names: str) -> str:
        return ", ".join(f"{name} {side(table, name)['score']:.3f}" for name in names)

    def ratio(table: Mapping[str, Any], name: str, what: str) -> str:
        return f"{side(table, name)[what] / side(table, 'lora')[what]:.1f}"

    rates = ", ".join(
        f"{loss:.2f} at {float(rate):.2g}" for rate, loss in e2e["lora"]["tuning"].items()
    )
    worst = min(side(sst2, "sparse: fisher")["by_seed"])
    near = ("full", "lisa", "loha", "hira", "dora", "lora", "adalora", "pissa", "lora-plus")
    return [
        "## In short",
        "",
        "- **Begin with `lora`.** It becomes a weight, PEFT reads it, and it mixes and trains "
        f"beside others in one product. On E2E: {score(e2e, *near)}; "
        "what is ahead beyond the noise trains at least twice as many parameters. "
        f"DoRA takes {ratio(sst2, 'dora', 'step_seconds')} times as long for a step on MiniLM.",
        f"- **Look for the rate before the method.** LoRA's loss on the tuning records of E2E: "
        f"{rates}. Between most methods lies less.",
        "- **`full` where the base is small.** It is ahead of LoRA on E2E, and at the edge of the "
        f"noise on SST-2, where it takes {ratio(sst2, 'full', 'step_seconds')} times as long for a "
        f"step, {ratio(sst2, 'full', 'peak_memory_bytes')} times the memory and a file "
        f"{ratio(sst2, 'full', 'adapter_bytes')} times as large.",
        "- **Few parameters cost quality where there is much to learn.** On E2E, whose form the "
        "base has never seen, the order of the losses is, but for virtual tokens and edits, "
        "nearly that of the trained parameters: "
        f"{score(e2e, 'lora', 'vera', 'lokr', 'houlsby', 'ia3', 'norms')}. On SST-2, which asks "
        f"for less, `ia3` cannot be told from LoRA, with a file "
        f"{1 / ratio_of(sst2, 'ia3'):.0f} times smaller.",
        "- **Virtual tokens need more steps than these.** On E2E the base alone has "
        f"{base_loss:.2f}: {score(e2e, 'prompt-tuning', 'p-tuning', 'prefix-tuning')}; on SST-2 "
        f"they are near chance: {score(sst2, 'prompt-tuning', 'prefix-tuning')}. Their use is one "
        "untouched base for many tasks, in files of some KB.",
        "- **Relevance did not beat chance here.** At 0.5 % of the weights, on E2E: "
        f"{score(e2e, 'sparse: random', 'sparse: fisher', 'sparse: gradient-weight')}; on SST-2: "
        f"{score(sst2, 'sparse: random', 'sparse: fisher', 'sparse: gradient-weight')}. On SST-2 "
        "the gradients are those of a head that was not trained yet. Run `selection: random` "
        "beside every other; on MiniLM a sparse step also costs more than LoRA's.",
        f"- **Run several seeds.** At the rate that was best with the first, a seed of "
        f"`sparse: fisher` ended at {worst:.2f} on SST-2, which is chance.",
        "",
    ]


def ratio_of(table: Mapping[str, Any], name: str) -> float:
    """A method's file as a share of LoRA's."""
    sizes = [table[key]["sides"]["lorica"]["adapter_bytes"] for key in (name, "lora")]
    return sizes[0] / sizes[1]
