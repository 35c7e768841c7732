"""The labels of a classification: how they are spread, and where they contradict."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from lorica.data.shapes import Row
from lorica.data.texts import input_of, normalised

_FEWEST_ON_A_SCALE = 10
"""Different labels above which numbers that are not all whole are no classes."""


def balance(rows: Sequence[Row]) -> dict[str, int]:
    """Label -> number of records, most frequent first."""
    return dict(Counter(str(row["label"]) for row in rows).most_common())


def are_scores(counts: dict[str, int]) -> bool:
    """Whether the labels are rather numbers on a scale: many of them, and some not whole."""
    try:
        values = [float(label) for label in counts]
    except ValueError:
        return False
    return len(values) > _FEWEST_ON_A_SCALE and any(not value.is_integer() for value in values)


def contradictions(rows: Sequence[Row]) -> list[list[int]]:
    """Groups of rows with the same input and different labels."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[normalised(input_of(row))].append(index)
    return [g for g in groups.values() if len({str(rows[i]["label"]) for i in g}) > 1]
