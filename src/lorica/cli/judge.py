"""Base and tuned on the same records: predictions, scores, samples side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lorica.attach.activate import Mixture, Stack, activate
from lorica.base.known import Base
from lorica.cli.voice import Voice
from lorica.data.secrets import hidden
from lorica.tasks.task import Prediction, Task

UNTRAINED_HEAD = (
    "the base has a new, untrained classification head, so its scores are those of chance"
)
"""Said where a base without a head of its own is scored."""


def predictions(
    model: nn.Module,
    mixture: Mixture | Stack,
    task: Task,
    records: Sequence[dict],
    voice: Voice,
    *,
    generate: bool,
    batch_size: int = 32,
    who: str = "the tuned model",
) -> list[Prediction]:
    """What base (mixture None) or tuned model say about the records; shows how far it is.

    Args:
        who: what is scored, in words, where it is not the base.
    """
    if not records:
        return []
    who = "the base" if mixture is None else who
    with (
        voice.work(f"scoring {who} on {len(records):,} records", len(records)) as done,
        activate(model, mixture),
    ):
        how: dict[str, Any] = {"generate": generate, "progress": done}
        found = task.predict(model, records, batch_size=batch_size, **how)
    cut = sum(p.num_cut > 0 for p in found)
    if cut and mixture is None:  # the same for both
        voice.say(
            f"scores: {cut:,} of {len(found):,} prompts lose their beginning, to leave room for "
            "the answer among the positions of the model",
            "warning",
        )
    return found


def tell_of_chance(base: Base, voice: Voice, *, alone: bool = False) -> None:
    """Say so where the base has a head that nobody has trained.

    Args:
        alone: nothing but the base is scored, so that the scores are worth nothing at all.
    """
    if base.task == "text-classification" and base.new_modules:
        voice.say(UNTRAINED_HEAD, "warning" if alone else "info")


def samples(
    before: Sequence[Prediction], after: Sequence[Prediction], task: Task, number: int
) -> list[dict]:
    """Inputs with the answers of both and the references, without keys, for the report: rows of
    samples.jsonl.
    """
    labels = getattr(task, "labels", ())
    shown = []
    for old, new in list(zip(before, after, strict=True))[:number]:
        if old.output is None:
            break
        shown.append(
            {
                "input": hidden(input_text(old.record)),
                "before": hidden(output_text(old.output, labels)),
                "after": hidden(output_text(new.output, labels)),
                "references": [hidden(output_text(r, labels)) for r in new.references],
            }
        )
    return shown


def input_text(record: dict) -> str:
    """What a record asks, as people read it."""
    if "messages" in record:
        return "\n".join(f"{m['role']}: {m['content']}" for m in record["messages"][:-1])
    text = str(record.get("prompt", record.get("source", record.get("text", ""))))
    return f"{text}\n{record['text_pair']}" if record.get("text_pair") else text


def output_text(output: Any, labels: Sequence[str]) -> str:
    """An answer or a reference, as people read it: a class by its name."""
    return labels[output] if isinstance(output, int) and output < len(labels) else str(output)
