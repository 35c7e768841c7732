"""Rows of one file by its ending; running text and Parquet are read here."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lorica.data.delimited import read_csv, read_tsv
from lorica.data.json_rows import read_json, read_jsonl, too_long
from lorica.data.problems import Problems, RowProblem, counted
from lorica.data.source import MAX_ROW_BYTES, open_regular, whole_text
from lorica.data.table import CONTROL, Reader, Table, Wish, check_strings, keep
from lorica.errors import DataError, MissingPackage

TEXT_ROW_CHARACTERS = 2_000  # paragraphs of a text file are joined up to this length
DOCUMENT_MARK = "<|endoftext|>"


def read_file(path: Path, wish: Wish, problems: Problems) -> Table:
    """Read one file by its ending.

    Raises:
        DataError: an unknown ending, or a file that cannot be opened or decoded.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: files ending in {path.suffix or 'nothing'} are not read",
            expected=f"one of {', '.join(READERS)}",
        )
    with open_regular(path) as file:
        return reader(file, str(path), wish, problems)


def check_rows(rows: list[Any], name: str, problems: Problems, wish: Wish) -> Table:
    """A table of rows that are already in memory, held to the same rules as those of a file."""
    table = Table()
    for number, row in enumerate(rows, start=1):
        if wish.reached(table):
            break
        try:
            control = check_strings(row)
            keep(table, row, number, control)
        except RowProblem as problem:
            problems.add(problem, name, number)
    return table


def read_text(file: BinaryIO, name: str, wish: Wish, problems: Problems) -> Table:
    """Documents parted by lines `<|endoftext|>`; without any, paragraphs joined to longer rows.

    Paragraphs (parted by blank lines) are joined in their order up to 2,000 characters, and longer
    ones divided at line ends, so that a row holds context and the rows of a file can still be
    shuffled, counted and held out.
    """
    text = whole_text(file, name)
    if (at := text.find("\0")) >= 0:
        line = text.count("\n", 0, at) + 1
        problems.add(RowProblem("a NUL character", mend="remove it"), name, line, fatal=True)
        return Table()
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    table = Table()
    marked = re.compile(rf"^[ \t]*{re.escape(DOCUMENT_MARK)}[ \t]*$", re.MULTILINE)
    if marked.search(text):
        blocks = _blocks(text, marked)
        table.notes.append(f"one document between lines {DOCUMENT_MARK}")
    else:
        paragraphs = list(_blocks(text, re.compile(r"\n[ \t]*(?=\n)")))
        blocks = _join(paragraphs)
        table.notes.append(
            f"{counted(len(paragraphs), 'paragraph')} of running text in rows of about "
            f"{TEXT_ROW_CHARACTERS:,} characters"
        )
    for line, block in blocks:
        if wish.reached(table):
            break
        if len(block) > MAX_ROW_BYTES:
            problems.add(too_long(), name, line)
            continue
        table.num_control += CONTROL.search(block) is not None
        table.add({"text": block}, line)
    return table


def _blocks(text: str, separator: re.Pattern) -> Iterator[tuple[int, str]]:
    """(first line, text) of what lies between the separators, empty blocks left out."""
    start, line, counted = 0, 1, 0
    for end, following in [
        *((m.start(), m.end()) for m in separator.finditer(text)),
        (len(text), 0),
    ]:
        raw = text[start:end]
        block = raw.strip("\n")
        if block.strip():
            begin = start + len(raw) - len(raw.lstrip("\n"))
            line, counted = line + text.count("\n", counted, begin), begin
            yield line, block
        start = following


def _join(paragraphs: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Units joined up to the length of a row; long paragraphs are divided at line ends first."""
    held, first = "", 1
    for line, unit, glue in _units(paragraphs):
        if held and len(held) + len(glue) + len(unit) > TEXT_ROW_CHARACTERS:
            yield first, held
            held = ""
        if not held:
            first, held = line, unit
        else:
            held += glue + unit
    if held:
        yield first, held


def _units(paragraphs: list[tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
    """(line, text, what parts it from the unit before)"""
    for line, paragraph in paragraphs:
        if len(paragraph) <= TEXT_ROW_CHARACTERS:
            yield line, paragraph, "\n\n"
            continue
        for number, text in enumerate(paragraph.split("\n")):
            yield line + number, text, "\n" if number else "\n\n"


def read_parquet(file: BinaryIO, name: str, wish: Wish, problems: Problems) -> Table:
    """Parquet by pyarrow; columns of types that JSON does not have are left out (stated)."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackage.of("pyarrow", "parquet", "reading Parquet") from error
    table = Table()
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        kept = [
            field.name for field in parquet.schema_arrow if _is_plain(pyarrow.types, field.type)
        ]
        for column in sorted(set(parquet.schema_arrow.names) - set(kept)):
            table.notes.append(f"column {column} left out: no text, number or list of these")
        for batch in parquet.iter_batches(columns=kept):
            for row in batch.to_pylist():
                if wish.reached(table):
                    return table
                _add_row(row, len(table.rows) + 1, name, table, problems)
    except Exception as error:  # the package raises a dozen kinds on a damaged file
        raise DataError(f"{name} is no readable Parquet file: {str(error)[:200]}") from error
    return table


def _is_plain(types: Any, kind: Any) -> bool:
    """Whether values of an Arrow type come out as text, numbers, and lists and dicts of these."""
    if types.is_struct(kind):
        return all(_is_plain(types, kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        return _is_plain(types, kind.value_type)
    tests = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_null,
    )
    return any(test(kind) for test in tests)


def _add_row(row: dict[str, Any], number: int, name: str, table: Table, problems: Problems) -> None:
    try:
        control = check_strings(row)
        table.num_control += control
        table.add(row, number)
    except RowProblem as problem:
        problems.add(problem, name, number)


READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".txt": read_text,
}
