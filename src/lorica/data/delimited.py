"""Rows of CSV and TSV. What was guessed (delimiter, meaning of quotes) is stated, never silent."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from lorica.data.problems import Problems, RowProblem
from lorica.data.source import MAX_ROW_BYTES, whole_text
from lorica.data.table import CONTROL, Table, Wish
from lorica.errors import DataError


def read_csv(file: BinaryIO, name: str, wish: Wish, problems: Problems) -> Table:
    """Comma-separated, or whatever of ; tab | splits the first records evenly (stated)."""
    text = _delimited_text(file, name)
    with _long_fields():
        delimiter = _guess_delimiter(text)
    table = _read_delimited(text, name, wish, problems, delimiter=delimiter)
    if delimiter != ",":
        table.notes.append(f"columns parted by {_delimiter_name(delimiter)}")
    return table


def read_tsv(file: BinaryIO, name: str, wish: Wish, problems: Problems) -> Table:
    """Tab-separated. Quotes are text, as in GLUE, unless every quoted field is quoted as in CSV."""
    text = _delimited_text(file, name)
    if '"' not in text:
        return _read_delimited(text, name, wish, problems, delimiter="\t", quoted=False)
    if quoted := _quotes_enclose(text):
        trial = Problems()
        table = _read_delimited(text, name, wish, trial, delimiter="\t")
        quoted = not trial
        if quoted:
            table.notes.append("quotes enclose fields")
            return table
    table = _read_delimited(text, name, wish, problems, delimiter="\t", quoted=False)
    table.notes.append("quotes are text")
    return table


@contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module refuses fields of more than 131,072 characters unless told otherwise."""
    previous = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(previous)


def _delimited_text(file: BinaryIO, name: str) -> str:
    text = whole_text(file, name)
    if (at := text.find("\0")) >= 0:
        raise DataError(
            f"{name}:{text.count(chr(10), 0, at) + 1} holds a NUL character", mend="remove it"
        )
    return text


def _delimiter_name(delimiter: str) -> str:
    return {"\t": "tabs", ";": "semicolons", "|": "bars"}[delimiter]


def _guess_delimiter(text: str) -> str:
    """The first of , ; tab | that gives the first 20 records the same number (> 1) of columns."""
    sample = text[:200_000]
    for delimiter in ",;\t|":
        rows = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter)
        widths = []
        try:
            while len(widths) < 20 and (row := next(rows, None)) is not None:
                if row:
                    widths.append(len(row))
        except csv.Error:
            continue
        if len(sample) < len(text) and len(widths) > 1 and len(widths) < 20:
            widths.pop()  # the sample may end inside a record
        if widths and widths[0] > 1 and len(set(widths)) == 1:
            return delimiter
    first = text.split("\n", 1)[0]
    return max(",;\t|", key=first.count)  # uneven, which the reader will report


_QUOTE_OPENS = re.compile(r'(?:^|\t)(?=")', re.MULTILINE)
_QUOTED_FIELD = re.compile(r'"(?:[^"]|"")*"(?=\t|\r|\n|\Z)')


def _quotes_enclose(text: str) -> bool:
    position, seen = 0, False
    while opening := _QUOTE_OPENS.search(text, position):
        closing = _QUOTED_FIELD.match(text, opening.end())
        if closing is None:
            return False
        position, seen = closing.end(), True
    return seen


def _read_delimited(
    text: str, name: str, wish: Wish, problems: Problems, *, delimiter: str, quoted: bool = True
) -> Table:
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=True)
    with _long_fields():
        table = _read_records(reader, name, wish, problems)
    if CONTROL.search(text):
        table.num_control = sum(
            any(CONTROL.search(cell) for cell in row.values()) for row in table.rows
        )
    return table


def _read_records(reader: Any, name: str, wish: Wish, problems: Problems) -> Table:
    table, line, width = Table(), 1, 0
    rows, lines = table.rows, table.lines
    header: list[str] | None = None
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(cells, table, name) if wish.header else _numbered(cells)
                width = len(header)
                if wish.header:
                    continue
            if len(rows) == wish.limit:
                break
            if len(cells) != width or cells == header:
                problem = _row_problem(cells, header)
                problems.add(problem, name, start, excerpt=" | ".join(cells))
                continue
            rows.append(dict(zip(header, cells, strict=True)))
            lines.append(start)
    except csv.Error as error:
        unclosed = "unexpected end" in str(error)
        what = "a quote that never closes" if unclosed else "a field that cannot be read"
        mend = 'close the quote; a quote inside a quoted field is written ""'
        if "field limit" in str(error):
            mend = "divide the field, or check that the quotes of the file close where they should"
        problems.add(RowProblem(what, str(error), mend=mend), name, line, fatal=True)
    return table


def _numbered(cells: list[str]) -> list[str]:
    return [str(index) for index in range(len(cells))]


def _header(cells: list[str], table: Table, name: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    for index, cell in enumerate(header):
        if not cell:  # the index column that pandas writes
            header[index] = f"column {index}"
            table.notes.append(f'the column without a name is called "column {index}"')
    twice = sorted(cell for cell, times in Counter(header).items() if times > 1)
    if twice:
        shown = ", ".join(cell[:60] for cell in twice[:10]) + (" ..." if twice[10:] else "")
        raise DataError(
            f"{name}:1 the header names a column twice: {shown}",
            mend="rename one; or, where the file has no header, give columns by their place: "
            'columns={"text": "3", "label": "1"}',
        )
    return header


def _row_problem(cells: list[str], header: list[str]) -> RowProblem:
    if len(cells) != len(header):
        return RowProblem(
            "a row with another number of columns",
            f"{len(cells)} instead of {len(header)}",
            mend="quote fields that hold the delimiter or a line break",
        )
    return RowProblem("the header again among the rows", mend="remove the line")
