"""The records of a run: what trains, what is held out, what is scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorica.base.load import EMBEDDED
from lorica.config import RunConfig
from lorica.data.facts import facts
from lorica.data.pack import order
from lorica.data.read import Dataset, from_rows, group_references, read, read_splits
from lorica.errors import DataError
from lorica.tasks.text_classification import label_names

GENERATING = ("prompt", "chat", "seq2seq")
"""Formats whose records have an output that a model can be asked for."""

FACTS = {"train": 8000, "valid": 200, "test": 200}
"""Records of the embedded data."""


@dataclass
class Material:
    """The records of a run.

    Attributes:
        train: what trains.
        valid: held-out records for the evaluation loss; None without any.
        scored: what base and tuned are scored on, in full; None without any.
        most: at most so many of `scored` and of `valid` are used; None for all.
    """

    train: Dataset
    valid: Dataset | None = None
    scored: Dataset | None = None
    most: int | None = None

    @property
    def held_out(self) -> Sequence[dict]:
        return self.valid.rows[: self.most] if self.valid else ()

    @property
    def test(self) -> Sequence[dict]:
        return self.scored.rows[: self.most] if self.scored else ()

    @property
    def generates(self) -> bool:
        return self.train.format in GENERATING

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of a classification, over all parts."""
        return label_names(
            [row for part in (self.train, self.valid, self.scored) if part for row in part.rows]
        )

    def task(self, wanted: str, model: str) -> str:
        """The task: as set, or as data and model say. Raises DataError where the two do not go together."""
        found = wanted
        if wanted == "auto":
            found = "text-classification" if self.train.format == "classification" else "causal-lm"
            if found == "causal-lm" and (
                self.train.format == "seq2seq" or is_encoder_decoder(model)
            ):
                found = "seq2seq"
        fitting = {
            "text-classification": ("classification",),
            "causal-lm": ("prompt", "chat", "text"),
            "seq2seq": ("seq2seq", "prompt"),
        }[found]
        if self.train.format not in fitting:
            raise DataError(
                f"records of the format {self.train.format!r} cannot be used for {found}",
                expected=f"one of: {', '.join(fitting)}",
                mend="set another task, or map the columns with --columns",
            )
        return found

    def metrics(self, task: str) -> tuple[str, ...]:
        """Scores that make sense for these records, the headline first."""
        if task == "text-classification":
            return ("accuracy", "macro_f1", "loss")
        if not self.generates:
            return ("perplexity",)
        slots = ("slot_accuracy",) if all("slots" in row for row in self.test) else ()
        return (*slots, "chrf", "bleu", "rouge_l", "exact_match", "perplexity")

    def statements(self) -> list[str]:
        """What was read, for the user."""
        parts = (("train", self.train), ("evaluation", self.valid), ("scoring", self.scored))
        lines = []
        for name, part in parts:
            if part is not None and (name != "scoring" or part is not self.valid):
                lines.append(f"{name}: {len(part):,} records; {part.statement.splitlines()[0]}")
        return lines


def gather(run: RunConfig, *, seed: int) -> Material:
    """Read what the settings name, and hold records out where nothing is given to evaluate on.

    The data "embedded" is the set that `lorica.data.facts` makes.
    """
    if run.data == "embedded":
        parts = {split: from_rows(facts(split, num_records=n), name=f"facts, {split}") for split, n in FACTS.items()}
        return Material(parts["train"], parts["valid"], parts["test"], run.eval_records)
    how = {"format": run.format, "columns": run.columns}
    parts = read_splits(run.data, **how)
    if "train" not in parts:
        raise DataError(
            f"{run.data} has no training part",
            expected="train.jsonl or the like",
            mend="name the file",
        )
    train = parts["train"]
    valid = read(run.eval_data, **how) if run.eval_data else parts.get("valid")
    scored = read(run.test_data, **how) if run.test_data else parts.get("test")
    if valid is None and run.num_held_out(len(train)) and len(train) > 1:
        train, valid = _hold_out(train, run.num_held_out(len(train)), seed)
    if scored is None:
        scored = valid
    if scored is not None and scored.format in GENERATING:
        scored = group_references(scored)
    return Material(train, valid, scored, run.eval_records)


def _hold_out(dataset: Dataset, number: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split off records by their input, so that no prompt is on both sides."""
    chosen: set[int] = set()
    inputs = [_input(row) for row in dataset.rows]
    groups: dict[str, list[int]] = {}
    for index, text in enumerate(inputs):
        groups.setdefault(text, []).append(index)
    keys = list(groups)
    for place in order(len(keys), seed=seed, epoch=0):
        if len(chosen) >= min(number, len(dataset) - 1):
            break
        chosen.update(groups[keys[int(place)]])
    if len(chosen) >= len(dataset):
        raise DataError(
            "all records have the same input, so none can be held out", mend="set eval_size: 0"
        )
    kept = [i for i in range(len(dataset)) if i not in chosen]
    why = f"{len(chosen):,} of {len(dataset):,} held out for evaluation, by input"
    return dataset.subset(kept, why), dataset.subset(sorted(chosen), why)


def _input(row: dict) -> str:
    if "messages" in row:
        return json.dumps(row["messages"][:-1], sort_keys=True)
    for key in ("prompt", "source"):
        if key in row:
            return str(row[key])
    return f"{row['text']}\n{row.get('text_pair', '')}"


def is_encoder_decoder(model: str) -> bool:
    """Whether the config of a base says that it is an encoder-decoder model."""
    folder = EMBEDDED if model == "embedded" else Path(model)
    if (folder / "config.json").is_file():
        return bool(
            json.loads((folder / "config.json").read_text(encoding="utf-8")).get(
                "is_encoder_decoder"
            )
        )
    if folder.exists():
        return False
    from transformers import AutoConfig

    return bool(getattr(AutoConfig.from_pretrained(model), "is_encoder_decoder", False))
