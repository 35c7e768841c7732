"""The records of a run: what trains, what is held out, what is scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lorica.cli.kinds import is_encoder, is_encoder_decoder, refuse_pictures
from lorica.config import Resolved, RunConfig
from lorica.data.dataset import Dataset, group_references
from lorica.data.facts import facts
from lorica.data.pack import order
from lorica.data.read import from_rows, read, read_splits
from lorica.data.texts import input_of
from lorica.errors import ConfigError, DataError
from lorica.tasks.text_classification import label_names

GENERATING = ("prompt", "chat", "seq2seq")
"""Formats whose records have an output that a model can be asked for."""

FITTING = {
    "text-classification": ("classification",),
    "causal-lm": ("prompt", "chat", "text"),
    "seq2seq": ("seq2seq", "prompt"),
}
"""Task -> the formats that it takes."""

FACTS = {"train": 8000, "valid": 200, "test": 200}
"""Records of the embedded data."""


@dataclass
class Material:
    """The records of a run.

    Attributes:
        train: what trains.
        valid: held-out records for the evaluation loss; None without any.
        scored: what base and tuned are scored on; None without any.
        statements: what was read and how it was parted, for the user.
        shared: the scored records are those of the evaluation, for want of others.
    """

    train: Dataset
    valid: Dataset | None = None
    scored: Dataset | None = None
    statements: list[str] = field(default_factory=list)
    shared: bool = False

    @property
    def held_out(self) -> Sequence[dict]:
        return self.valid.rows if self.valid else ()

    @property
    def test(self) -> Sequence[dict]:
        return self.scored.rows if self.scored else ()

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
        """The task: as set, or as data and model say. Raises DataError where these disagree."""
        found = wanted
        if wanted == "auto":
            found = "text-classification" if self.train.format == "classification" else "causal-lm"
            if found == "causal-lm" and (
                self.train.format == "seq2seq" or is_encoder_decoder(model)
            ):
                found = "seq2seq"
        check_format(self.train, found)
        if found == "causal-lm" and is_encoder(model):
            raise DataError(
                f"{model} is an encoder: it reads a text as a whole and cannot continue one",
                expected="for this base, records of text and label",
                mend="map such columns: --columns text=...,label=..., or choose a base that "
                "continues texts",
            )
        return found

    def metrics(self, task: str) -> tuple[str, ...]:
        """Scores that make sense for these records, the headline first."""
        if task == "text-classification":
            return ("accuracy", "macro_f1", "loss")
        if not self.generates:
            return ("perplexity",)
        slots = ("slot_accuracy",) if self.test and all("slots" in r for r in self.test) else ()
        return (*slots, "chrf", "bleu", "rouge_l", "exact_match", "perplexity")


def class_names(records: Dataset) -> tuple[str, ...]:
    """The classes of records that have names for them; numbers need none."""
    if records.format != "classification":
        return ()
    names = label_names(records.rows)
    return () if all(name.isdigit() for name in names) else names


def check_format(records: Dataset, task: str) -> None:
    """Raises DataError where a task cannot use records of this format."""
    if records.format not in FITTING[task]:
        fit = [name for name, formats in FITTING.items() if records.format in formats]
        raise DataError(
            f"records of the format {records.format!r} cannot be used for {task}",
            expected=f"the format {' or '.join(FITTING[task])}",
            mend=f"set --task {fit[0]}, or map the columns with --columns",
        )


def gather(run: RunConfig, *, seed: int) -> Material:
    """Read what the settings name, and hold records out where nothing is given to evaluate on.

    The data "embedded" is the set that `lorica.data.facts` makes.
    """
    parts = read_parts(run)
    if "train" not in parts:
        raise DataError(
            f"{run.data} has no training part",
            expected="train.jsonl or the like",
            mend="name the file",
        )
    told = _told(parts)
    train, valid, scored = parts["train"], parts.get("valid"), parts.get("test")
    number = run.num_held_out(len(train))
    if valid is None and number and len(train) > 1:
        total = len(train)
        train, valid = _hold_out(train, number, seed)
        told.append(
            f"{len(train):,} of {total:,} records train; {len(valid):,} are held out by their "
            "input, so that no input is on both sides"
        )
    material = Material(train, valid, None, told)
    if valid is not None:
        material.valid, why = drawn(valid, run.eval_records, seed)
        told += [f"evaluation loss: on {why}"] if why else []
    material.shared = scored is None and valid is not None
    scored = valid if scored is None else scored
    if scored is not None:
        material.scored, why = for_scoring(scored, run.eval_records, seed)
        told += [f"scores: on {why}"] if why else []
    else:
        told.append("nothing is held out: base and tuned will not be compared")
    return material


def read_scored(data: str, **how: Any) -> Dataset:
    """The records that a command scores on; of "embedded", those that a run is scored on.

    Raises:
        ConfigError: a format or columns for the embedded records, which are what they are.
    """
    if data != "embedded":
        return read(data, **how)
    if given := [name for name, value in how.items() if value is not None]:
        raise ConfigError(
            f"the embedded records take no {' and no '.join(given)}", mend="leave it out"
        )
    return _embedded()["test"]


def for_scoring(records: Dataset, most: int | None, seed: int) -> tuple[Dataset, str]:
    """Records with all references of an input together, at most so many; and what was done."""
    if records.format not in GENERATING:
        return drawn(records, most, seed)
    grouped = group_references(records)
    chosen, why = drawn(grouped, most, seed, "inputs")
    if len(grouped) == len(records):
        return chosen, why.replace("inputs", "records")
    references = f", which have {len(records):,} references in all"
    return chosen, (why or f"{len(grouped):,} inputs") + references


def drawn(records: Dataset, most: int | None, seed: int, what: str = "records") -> tuple:
    """At most so many records, drawn rather than the first, which may all be of one class."""
    if most is None or len(records) <= most:
        return records, ""
    chosen = sorted(int(i) for i in order(len(records), seed=seed)[:most])
    why = f"{most:,} of {len(records):,} {what}, drawn with seed {seed}"
    return records.subset(chosen, why), why


def with_system(dataset: Dataset, system: str | None) -> Dataset:
    """Chat records, each with a system message; those that have one keep it."""
    if system is None or dataset.format != "chat":
        return dataset
    first = {"role": "system", "content": system}
    rows = [
        row
        if row["messages"][0]["role"] == "system"
        else {**row, "messages": [first, *row["messages"]]}
        for row in dataset.rows
    ]
    return replace(dataset, rows=rows)


def _embedded() -> dict[str, Dataset]:
    return {
        split: from_rows(facts(split, num_records=number), name=f"embedded facts, {split}")
        for split, number in FACTS.items()
    }


def read_parts(run: RunConfig, *, max_bad_rows: int = 0) -> dict[str, Dataset]:
    """The records that the settings name, by split: "train", "valid", "test"."""
    refuse_pictures(run.task, run.model)
    if run.data == "embedded":
        return _embedded()
    how = {"format": run.format, "columns": run.columns, "max_bad_rows": max_bad_rows}
    parts = read_splits(run.data, **how)
    if run.eval_data:
        parts["valid"] = read(run.eval_data, **how)
    if run.test_data:
        parts["test"] = read(run.test_data, **how)
    return {name: with_system(part, run.system) for name, part in parts.items()}


def _told(parts: dict[str, Dataset]) -> list[str]:
    """What was read. What holds for all parts is told once."""
    if len(parts) == 1:
        return [f"data: {part.statement}" for part in parts.values()]
    names = {"train": "training", "valid": "evaluation", "test": "scoring"}
    clauses = {names[name]: part.statement.split("; ") for name, part in parts.items()}
    shared = [c for c in clauses["training"][1:] if all(c in own for own in clauses.values())]
    lines = [
        f"{name} data: {'; '.join(c for c in own if c not in shared)}"
        for name, own in clauses.items()
    ]
    return [*lines, f"all of them: {'; '.join(shared)}"] if shared else lines


def _hold_out(dataset: Dataset, number: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split off records by their input, so that no prompt is on both sides."""
    chosen: set[int] = set()
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(dataset.rows):
        groups.setdefault(input_of(row), []).append(index)
    keys = list(groups)
    for place in order(len(keys), seed=seed):
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


def chosen_by_scored(settings: Resolved, material: Material) -> bool:
    """Whether the records that are scored also choose which adapter is kept."""
    return material.shared and settings.train.keep_best
