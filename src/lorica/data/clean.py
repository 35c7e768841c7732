"""Repair a data set: leave out what repeats, leaks or is empty, blank out secrets. Every step says
what it did.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorica.data.dataset import Dataset, digest_of
from lorica.data.duplicates import NearIndex, keys_of, near_parts, repeats, shared_inputs
from lorica.data.problems import counted
from lorica.data.secrets import redacted
from lorica.data.shapes import Row
from lorica.data.texts import input_of, normalised

# control characters but tab and line feed, zero-width signs, marks that turn the direction of text
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Step:
    """What a step of the cleaning did: its name, how many rows it left out, how many it changed."""

    name: str
    removed: int
    changed: int
    text: str


@dataclass(frozen=True)
class Cleaned:
    """The repaired rows, and what was done to get them."""

    dataset: Dataset
    steps: tuple[Step, ...]


def clean(
    dataset: Dataset,
    *,
    against: Sequence[Dataset] = (),
    normalise: bool = True,
    exact: bool = True,
    near: bool = False,
    redact: bool = False,
) -> Cleaned:
    """Repair a data set; the input is not changed.

    Args:
        against: evaluation records; rows with an input of theirs are left out.
        normalise: canonical Unicode (NFC), line ends, no unseen control characters.
        exact, near: leave the first of rows that are the same, or nearly.
        redact: replace what has the form of a secret or of personal data by [EMAIL] and so on.

    Raises:
        MissingPackage: `near` without datasketch.
    """
    steps: list[Step] = []
    if normalise:
        dataset = _changed(dataset, _plain, "normalise", "have plain Unicode now", steps)
    if redact:
        dataset = _changed(dataset, _blanked, "redact", "had a secret or personal data", steps)
    if exact:
        again = repeats(keys_of(dataset.rows))
        dataset = _without(dataset, set(again), "exact", "repeat an earlier one", steps)
    if near:
        twins = NearIndex().near([near_parts(row) for row in dataset.rows])
        close = {i for i, twin in enumerate(twins) if twin is not None}
        dataset = _without(dataset, close, "near", "are nearly the same as an earlier one", steps)
    if against:
        leaked = {i for part in against for i in shared_inputs(part.rows, dataset.rows)}
        if near:
            leaked |= _nearly_leaked(dataset, against)
        dataset = _without(dataset, leaked, "leak", "have an input of the evaluation", steps)
    return Cleaned(dataset, tuple(steps))


def _nearly_leaked(dataset: Dataset, against: Sequence[Dataset]) -> set[int]:
    index = NearIndex()
    for part in against:
        for _ in index.near([(normalised(input_of(row)),) for row in part.rows]):
            pass
    asked = [(normalised(input_of(row)),) for row in dataset.rows]
    return {i for i, twin in enumerate(index.near(asked, add=False)) if twin is not None}


def _without(dataset: Dataset, rows: set[int], name: str, why: str, steps: list[Step]) -> Dataset:
    text = f"{counted(len(rows), 'row')} left out that {why}"
    steps.append(Step(name, len(rows), 0, text))
    if not rows:
        return dataset
    return dataset.subset([i for i in range(len(dataset)) if i not in rows], text)


def _changed(
    dataset: Dataset, change: Callable[[str], str], name: str, why: str, steps: list[Step]
) -> Dataset:
    rows = [_mapped(row, change) for row in dataset.rows]
    number = sum(new != old for new, old in zip(rows, dataset.rows, strict=True))
    steps.append(Step(name, 0, number, f"{counted(number, 'row')} that {why}"))
    return replace(dataset, rows=rows, digest=digest_of(rows)) if number else dataset


def _mapped(row: Row, change: Callable[[str], str]) -> Row:
    """The row with every text of it changed, also those in columns that are kept beside."""

    def inner(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, list):
            return [inner(item) for item in value]
        if isinstance(value, dict):
            return {key: item if key == "role" else inner(item) for key, item in value.items()}
        return value

    return {key: value if key == "label" else inner(value) for key, value in row.items()}


def _plain(text: str) -> str:
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    return _UNSEEN.sub("", unicodedata.normalize("NFC", lines))


def _blanked(text: str) -> str:
    return redacted(text)[0]
