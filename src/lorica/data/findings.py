"""What a check found: how bad it is, how often it occurs, where, and what to do about it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lorica.data.dataset import Dataset
from lorica.data.problems import show

Severity = Literal["refuse", "warn", "info"]
ORDER: tuple[Severity, ...] = ("refuse", "warn", "info")
"""refuse: training on this cannot work. warn: it works, but probably not as meant. info: good to
know."""
SHOWN = 5
"""Places that are named per finding."""


@dataclass(frozen=True)
class Finding:
    """One kind of fault, or of fact, in a data set.

    Attributes:
        code: its name for programs; stable.
        severity: see `ORDER`.
        text: what was found, in one sentence.
        count: records that it concerns; 0 where it is about the whole.
        where: the first places, with an excerpt each.
        mend: what to do.
    """

    code: str
    severity: Severity
    text: str
    count: int = 0
    where: tuple[str, ...] = ()
    mend: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "where": list(self.where)}


def sorted_by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """The worst first; those of one severity by the number of records."""
    return sorted(findings, key=lambda f: (ORDER.index(f.severity), -f.count))


def places(dataset: Dataset, rows: Sequence[int], said: Sequence[str] = ()) -> tuple[str, ...]:
    """The first places as `file:line` with what is said of them; also the number of the record
    where a line holds several.

    Args:
        rows: indices of rows.
        said: for each of them an excerpt or a remark; nothing where it is shorter.
    """
    shown = []
    for number, row in enumerate(rows[:SHOWN]):
        file, line = dataset.origins[row]
        beside = dataset.origins[max(0, row - 1) : row] + dataset.origins[row + 1 : row + 2]
        record = f" (record {row + 1})" if (file, line) in beside else ""
        shown.append(f"{file}:{line}{record}" + (f"  {said[number]}" if number < len(said) else ""))
    return tuple(shown)


def beside(
    words: str,
    pairs: Mapping[int, int],
    earlier: Dataset,
    shown: Callable[[int], str] | None = None,
) -> list[str]:
    """What is said of rows that are like earlier ones: `as 7: the beginning of the text`.

    Args:
        words: in front of the line of the earlier row.
        pairs: row -> the earlier one.
        shown: the text of a row; nothing is shown without it.
    """
    said = []
    for row, other in list(pairs.items())[:SHOWN]:
        line = f"{words} {earlier.origins[other][1]}"
        said.append(f"{line}: {excerpt(shown(row))}" if shown else line)
    return said


def excerpt(text: str) -> str:
    """The beginning of a text in one line."""
    return show(" ".join(text.split()), 60)


def share(part: int, whole: int) -> str:
    """`12 of 400 (3.0%)`."""
    return f"{part:,} of {whole:,} ({part / max(1, whole):.1%})"
