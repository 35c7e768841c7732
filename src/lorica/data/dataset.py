"""A data set: canonical rows with their origins, what was done to them, and their digest."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from lorica.data.shapes import CANONICAL, Row
from lorica.errors import DataError


@dataclass(frozen=True, repr=False)
class Dataset(Sequence[Row]):
    """Rows in one canonical format.

    Attributes:
        rows: dicts as `lorica.data.formats` draws them; further keys of the source are kept.
        format: "chat", "prompt", "text", "classification" or "seq2seq".
        origins: (file, line or record number) of each row.
        statement: what was detected and converted, for the user.
        digest: sha256 over the canonical JSON of the rows, whatever file they came from.
    """

    rows: list[Row]
    format: str
    origins: list[tuple[str, int]]
    statement: str
    digest: str

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index):
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Dataset({len(self):,} rows, {self.format}, {self.digest[:12]})"

    def subset(self, indices: Sequence[int], why: str) -> "Dataset":
        """The rows at `indices`, in that order; `why` is added to the statement."""
        return make_dataset(
            [self.rows[index] for index in indices],
            self.format,
            [self.origins[index] for index in indices],
            f"{self.statement}; {why}",
        )


def make_dataset(
    rows: list[Row], format: str, origins: list[tuple[str, int]], statement: str
) -> Dataset:
    """A dataset of canonical rows, with its digest."""
    return Dataset(rows, format, origins, statement, digest_of(rows))


def digest_of(rows: Sequence[Row]) -> str:
    """sha256 over the rows as JSON with sorted keys, without spaces, a comma between two rows."""
    encoder = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256()
    for start in range(0, len(rows), 1000):
        part = encoder.encode(rows[start : start + 1000])[1:-1]
        digest.update(("," * (start > 0) + part).encode("utf-8"))
    return digest.hexdigest()


def group_references(dataset: Dataset) -> Dataset:
    """Merge rows with the same input into one that has all their targets as "references".

    The first row of each input stays, with its own target first among the references; its other
    keys are kept. For scoring against all acceptable outputs (E2E: 4,693 rows -> 630 inputs).

    Raises:
        DataError: the format has no free output (text, classification).
    """
    keys = {"prompt": ("prompt", "completion"), "seq2seq": ("source", "target")}
    if dataset.format not in (*keys, "chat"):
        raise DataError(
            f"rows of format {dataset.format} have no references",
            expected="prompt, seq2seq or chat",
        )
    merged: dict[str, tuple[Row, tuple[str, int]]] = {}
    for row, origin in zip(dataset.rows, dataset.origins, strict=True):
        if dataset.format == "chat":
            key = json.dumps(row["messages"][:-1], sort_keys=True)
            target = row["messages"][-1]["content"]
        else:
            key, target = (row[name] for name in keys[dataset.format])
        kept, _ = merged.setdefault(key, ({**row, "references": []}, origin))
        for text in (target, *row.get("references", ())):
            if text not in kept["references"]:
                kept["references"].append(text)
    rows = [row for row, _ in merged.values()]
    statement = (
        f"{dataset.statement}\n{len(dataset):,} rows grouped into {len(rows):,} with references"
    )
    return make_dataset(rows, dataset.format, [origin for _, origin in merged.values()], statement)


def identities(rows: Sequence[Row], format: str) -> set:
    """What makes rows the same to training: the canonical columns."""
    if format == "chat":
        return {json.dumps(row["messages"], sort_keys=True) for row in rows}
    if format == "text":
        return {row["text"] for row in rows}
    need, may = CANONICAL[format]
    first, second = need
    return {(row[first], row[second], *(row.get(name) for name in may)) for row in rows}
