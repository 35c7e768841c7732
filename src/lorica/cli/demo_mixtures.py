"""Two adapters at once: how much is right, and how much is in style, by their weights.

The facts are those of the demo's run, read from its folder; the style travels with the package and
was made by scripts/train_style.py.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorica.base.load import load_model
from lorica.base.locate import EMBEDDED
from lorica.cli.judge import predictions
from lorica.cli.opening import adapter_facts, task_of
from lorica.cli.voice import Voice
from lorica.data.cat_sentences import MARKS
from lorica.data.facts import facts
from lorica.evaluate.score import score
from lorica.files.adapter import load_adapter
from lorica.records.atomic import write_file
from lorica.records.folder import RunFolder, json_text
from lorica.records.read import read_manifest

STYLE = EMBEDDED.parent / "embedded_style"
"""The adapter that travels with the package."""

WEIGHTS = ((1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (0.5, 0.5), (0.0, 1.0))
"""Of facts and style."""

NAMES = ("facts", "style")
METRICS = ("slot_accuracy", "style_marks")


def add_mixtures(
    path: Path, *, num_records: int, max_new_tokens: int, voice: Voice
) -> dict[str, Any]:
    """Score the mixtures of a finished run with the style and note them in its run.json.

    Args:
        path: the run folder.
        num_records: test records of the facts that every mixture answers.
        max_new_tokens: of an answer.

    Returns:
        What `records.mixtures` shows: {"adapters", "num_records", "input", "mixtures": [{"weights",
        "scores", "output"}]}, with input and output of the first record.
    """
    with RunFolder.open(path) as folder:
        model = load_model("embedded", task="causal-lm", dtype="float32")  # as the run had it
        for name, place in zip(NAMES, (folder.adapter(), STYLE), strict=True):
            load_adapter(model, place, name=name)
        task = task_of(model, adapter_facts(folder.adapter())["task"], max_new_tokens)
        records = [{**row, "marks": MARKS} for row in facts("test", num_records=num_records)]
        mixtures = []
        for weights in WEIGHTS:
            mixture: dict[str, Any] = dict(zip(NAMES, weights, strict=True))
            who = " and ".join(f"{name} {w:g}" for name, w in mixture.items())
            found = predictions(model, mixture, task, records, voice, generate=True, who=who)
            scores = {name: asdict(one) for name, one in score(found, METRICS).items()}
            output = str(found[0].output)
            mixtures.append({"weights": list(weights), "scores": scores, "output": output})
        made = {
            "adapters": list(NAMES),
            "num_records": num_records,
            "input": records[0]["prompt"].strip(),
            "mixtures": mixtures,
        }
        manifest = read_manifest(folder.manifest)
        write_file(folder.manifest, json_text({**manifest, "mixtures": made}))
    return made
