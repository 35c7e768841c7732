"""A table of rows as they stand in a file, and what no string in it may hold."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from lorica.data.problems import Problems, RowProblem

MAX_DEPTH = 100  # nesting of JSON values


@dataclass
class Table:
    """The rows of one file as they stand there.

    Attributes:
        rows: one dict per record.
        lines: line (JSONL, JSON, CSV, TSV, text) or record number (Parquet) of each row, from 1.
        notes: what had to be decided to read the file, in words for the user.
        num_control: rows that hold control characters (kept).
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_control: int = 0

    def add(self, row: dict[str, Any], line: int) -> None:
        self.rows.append(row)
        self.lines.append(line)


@dataclass(frozen=True)
class Wish:
    """How to read a file. `header` False: the columns of CSV and TSV are named "0", "1", ..."""

    limit: int | None = None
    header: bool = True

    def reached(self, table: Table) -> bool:
        return self.limit is not None and len(table.rows) >= self.limit


Reader = Callable[[BinaryIO, str, Wish, Problems], Table]


def keep(table: Table, value: Any, line: int, control: bool) -> None:
    if not isinstance(value, dict):
        name = type(value).__name__
        raise RowProblem(
            "not an object", f"a {name}", mend='write each row as {"column": value, ...}'
        )
    table.num_control += control
    table.add(value, line)


CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def check_strings(value: Any) -> bool:
    """Whether control characters other than tab, CR and LF occur in a decoded row.

    Raises:
        RowProblem: NUL, a lone surrogate, or values nested too deeply.
    """
    control, level = False, [value]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return control
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, str):
                control |= _check_string(item)
            elif isinstance(item, dict):
                deeper += item.keys()
                deeper += item.values()
            elif isinstance(item, list):
                deeper += item
        level = deeper
    raise RowProblem("nested too deeply", f"more than {MAX_DEPTH} levels", mend="flatten the row")


def _check_string(text: str) -> bool:
    if found := _SURROGATE.search(text):
        raise RowProblem(
            "half of a surrogate pair",
            f"\\u{ord(found[0]):04x}",
            mend="write the whole character (a tool cut an emoji in two)",
        )
    found = CONTROL.search(text)
    if found and "\0" in text:
        raise RowProblem("a NUL character", mend="remove it")
    return found is not None
