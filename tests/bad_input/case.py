"""One bad input: what is given, and what Lorica has to say to it.

The cases of all tables are in `cases.py`; the tests run them, docs/bad-input.md is made of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorica.errors import LoricaError

LONGEST = 260  # characters of a message on the page


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        row: of the tables of docs/bad-input.md, such as "D-07".
        given: what is given, in words; with the row, the name of the test.
        act: gives it to Lorica, in an empty folder; returns what Lorica says where it is accepted.
        error: what is raised; None where the input is accepted, repaired or told of.
        says: words that must be in what is said.
    """

    row: str
    given: str
    act: Callable[[Path], object]
    error: type[LoricaError] | None
    says: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.row} {self.given}"


def said(case: Case, folder: Path) -> str:
    """What Lorica says to the input. Anything but the error that the case names comes through."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            text = str(case.act(folder))
    except LoricaError as error:
        if case.error is None or not isinstance(error, case.error):
            raise
        text = str(error)
    else:
        assert case.error is None, f"it was accepted: {text[:200]}"
    return text.replace(f"{folder}/", "").replace(str(folder), ".")


def shown(text: str) -> str:
    """What was said, in one line and shortened."""
    line = " ".join(text.split()).replace("`", "'")
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
