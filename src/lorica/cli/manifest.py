"""What the command knows for run.json and the loop does not: where the records come from."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lorica.cli.material import chosen_by_scored
from lorica.cli.prepared import Prepared
from lorica.data.encode import IGNORED
from lorica.data.secrets import hidden
from lorica.records.read import read_manifest
from lorica.tasks.task import Task


def manifest(prepared: Prepared, path: Path) -> dict[str, Any]:
    """The entries "data" and "run" of run.json, and the classes of a classification."""
    material, examples = prepared.material, prepared.examples
    lengths = sorted(len(e) for e in examples)
    trained = {
        "path": prepared.settings.run.data,
        "num_records": len(material.train),
        "digest": material.train.digest,
        "format": material.train.format,
        "statement": material.train.statement,
        "num_tokens": examples.num_tokens,
        "num_trained_tokens": examples.num_trained_tokens,
        "length_percentiles": {
            "p50": lengths[len(lengths) // 2],
            "p95": lengths[int(len(lengths) * 0.95)],
            "max": lengths[-1],
        },
        "num_truncated": examples.num_truncated,
        "example": marked(prepared.task, examples[0]),
    }
    others: dict[str, dict[str, Any]] = {
        name: {
            "num_records": len(rows),
            "digest": rows.digest,
            "format": rows.format,
            "statement": rows.statement,
        }
        for name, rows in (("eval", material.valid), ("test", material.scored))
        if rows is not None
    }
    if "test" in others and chosen_by_scored(prepared.settings, material):
        others["test"]["chose_the_adapter"] = True
    labels, trial = prepared.base.labels, trial_of(prepared, path)
    return {
        **({"trial": trial} if trial else {}),
        "data": {"train": trained, **others},
        **({"plan": {"memory": prepared.memory}} if prepared.memory else {}),
        "run": {
            "path": str(path),
            "command": "train",
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        **({"labels": list(labels), "num_labels": len(labels)} if labels else {}),
    }


def trial_of(prepared: Prepared, path: Path) -> dict[str, Any] | None:
    """What a search before the run found: now, or before the run was stopped."""
    if prepared.trial is not None:
        return {**asdict(prepared.trial), "best": prepared.trial.best}
    there = path / "run.json"
    return read_manifest(there).get("trial") if there.is_file() else None


def marked(task: Task, example: Any) -> list[list]:
    """A record as the model sees it, but for keys: stretches of text, each trained or not."""

    def decode(ids: Any) -> str:
        return hidden(task.tokenizer.decode(ids))

    if len(example.labels) != len(example.input_ids):  # a class or a target text
        return [[decode(example.input_ids), False]]
    stretches: list[tuple[list[int], bool]] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if not stretches or stretches[-1][1] is not (label != IGNORED):
            stretches.append(([], label != IGNORED))
        stretches[-1][0].append(token)
    return [[decode(ids), trained] for ids, trained in stretches]
