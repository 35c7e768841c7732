"""The two adapters of the demo at once: how much is right, and how much is in style, by weights.

Both are read from the run folder, so what is shown is what anybody can do with the files.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorica.cli.gathering import gathered
from lorica.cli.judge import predictions
from lorica.cli.voice import Voice
from lorica.data.cat_sentences import MARKS
from lorica.data.facts import facts
from lorica.evaluate.score import score
from lorica.records.atomic import write_file
from lorica.records.folder import RunFolder, json_text
from lorica.records.read import read_manifest

WEIGHTS = ((1.0, 0.0), (1.0, 0.5), (1.0, 1.0), (0.5, 0.5), (0.5, 1.0), (0.0, 1.0))
"""Of facts and style."""

METRICS = ("slot_accuracy", "style_marks")


def add_mixtures(
    path: Path, names: tuple[str, str], *, num_records: int, max_new_tokens: int, voice: Voice
) -> dict[str, Any]:
    """Score the mixtures of two adapters of a finished run and note them in its run.json.

    Args:
        path: the run folder.
        names: of the adapters, in the order of `WEIGHTS`.
        num_records: test records of the facts that every mixture answers.
        max_new_tokens: of an answer.

    Returns:
        What `records.mixtures` shows: {"adapters", "num_records", "input", "mixtures": [{"weights",
        "scores", "output"}]}, with input and output of the first record.
    """
    with RunFolder.open(path) as folder:
        group = gathered([folder.adapter(name) for name in names], base=None, whole=True)
        assert group.task is not None
        group.task.max_new_tokens = max_new_tokens  # type: ignore[attr-defined]
        records = [{**row, "marks": MARKS} for row in facts("test", num_records=num_records)]
        mixtures = []
        for weights in WEIGHTS:
            mixture = dict(zip(group.names, weights, strict=True))
            who = " and ".join(f"{name} {w:g}" for name, w in zip(names, weights, strict=True))
            given = (group.model, mixture, group.task, records, voice)
            found = predictions(*given, generate=True, who=who)
            scores = {name: asdict(one) for name, one in score(found, METRICS).items()}
            output = str(found[0].output)
            mixtures.append({"weights": list(weights), "scores": scores, "output": output})
        made = {
            "adapters": list(names),
            "num_records": num_records,
            "input": records[0]["prompt"].strip(),
            "mixtures": mixtures,
        }
        manifest = read_manifest(folder.manifest)
        write_file(folder.manifest, json_text({**manifest, "mixtures": made}))
    return made
