"""Rows of JSONL and JSON, strict: what two readers could understand differently is refused."""

import io
import json
import math
import re
from collections import Counter
from typing import Any, BinaryIO, NoReturn

from lorica.data.problems import Problems, RowProblem, around, show
from lorica.data.source import MAX_ROW_BYTES, as_utf8, whole_text
from lorica.data.table import MAX_DEPTH, Table, Wish, check_strings, keep
from lorica.errors import DataError

_LIST_KEYS = ("data", "rows", "examples", "records")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = next(name for name, times in Counter(k for k, _ in pairs).items() if times > 1)
        raise RowProblem("a key stands twice in one object", show(twice), mend="keep one of them")
    return value


def _refuse_constant(word: str) -> NoReturn:
    raise RowProblem("a number that JSON does not have", word, mend="write null, or leave it out")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        _refuse_constant(digits[:30])
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite
)
# finds the end of a value that the strict one refused
_LENIENT = json.JSONDecoder(parse_int=str)
_SUSPICIOUS = re.compile(r"\\(?:u(?:00[01]|[dD][89a-fA-F])|[bf])")  # what an escape can smuggle in


def _decode_row(text: str, start: int = 0, *, alone: bool) -> tuple[Any, int, bool]:
    """(value, end, whether control characters occur); `alone`: nothing may follow the value."""
    try:
        if alone:
            value, end = _DECODER.decode(text), len(text)
        else:
            value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise RowProblem(
            "nested too deeply", f"more than {MAX_DEPTH} levels", mend="flatten the row"
        ) from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # Python refuses integers of more than 4,300 digits
        raise RowProblem("a number that is too long", str(error)[:60], mend="quote it") from None
    suspicious = _SUSPICIOUS.search(text, start, end) is not None
    nested = text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH
    control = check_strings(value) if suspicious or nested else False
    if end - start > MAX_ROW_BYTES:
        raise too_long()
    return value, end, control


def too_long() -> RowProblem:
    """Of a row that no tokenizer should be asked to hold."""
    return RowProblem(
        "a row that is too long",
        f"more than {MAX_ROW_BYTES >> 20} MiB",
        mend="split it, or check that the lines of the file end where they should",
    )


def _hint(text: str, error: json.JSONDecodeError) -> str:
    start = text.lstrip()
    if error.msg == "Extra data":
        return "one object per line: break the line between the objects"
    if start.startswith("["):
        return "this looks like a JSON array: name the file .json"
    if start.startswith(("{'", "{ '")):
        return "keys and strings need double quotes (json.dumps writes them)"
    if re.search(r",\s*[}\]]", text):
        return "remove the comma before the closing bracket"
    if not text.rstrip().endswith("}"):
        return "the line is cut off: write the file again"
    return "write each row with json.dumps"


def read_jsonl(file: BinaryIO, name: str, wish: Wish, problems: Problems) -> Table:
    """One JSON object per line; lines end at LF, CR or CR LF and nowhere else."""
    file = as_utf8(file, name)
    table, number = Table(), 0
    while not wish.reached(table):
        raw = file.readline(MAX_ROW_BYTES + 2)
        if not raw:
            break
        if len(raw) > MAX_ROW_BYTES + 1:
            problems.add(too_long(), name, number + 1, fatal=True)
            break
        # a bare CR cannot stand inside a JSON value, so that it always ends a line
        parts = raw.split(b"\r") if b"\r" in raw[:-2] else (raw,)
        for part in parts:
            if part == b"\n" and len(parts) > 1:
                continue
            number += 1
            _read_line(part, name, number, table, problems)
    return table


def _read_line(raw: bytes, name: str, number: int, table: Table, problems: Problems) -> None:
    if not raw.strip():
        return
    text = ""
    try:
        if b"\0" in raw:
            wide = 2 * raw.count(b"\0") >= len(raw) - 2
            mend = "this is UTF-16 or UTF-32: convert it to UTF-8" if wide else "remove it"
            raise RowProblem("a NUL character", column=raw.index(b"\0") + 1, mend=mend)
        text = raw.decode("utf-8").rstrip("\r\n")
        value, _, control = _decode_row(text, alone=True)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            mend = "this looks like a JSON array: name the file .json"
            raise RowProblem("not an object", "a list of rows", mend=mend)
        keep(table, value, number, control)
    except UnicodeDecodeError as error:
        problem = RowProblem(
            "not UTF-8",
            f"byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line",
            mend=f"iconv -f LATIN1 -t UTF-8 {name}   # or whatever encoding it was written in",
        )
        problems.add(problem, name, number, excerpt=raw[:500].decode("latin-1"))
    except json.JSONDecodeError as error:
        problem = RowProblem(
            "not valid JSON", error.msg, column=error.colno, mend=_hint(text, error)
        )
        problems.add(problem, name, number, excerpt=around(text, error.pos))
    except RowProblem as problem:
        problems.add(problem, name, number, excerpt=text)


_GAP = re.compile(r"[ \t\r\n]*")


def read_json(file: BinaryIO, name: str, wish: Wish, problems: Problems) -> Table:
    """An array of objects, or an object whose "data" is one; a file of lines is read as JSONL."""
    text = whole_text(file, name)
    start = _match_end(_GAP, text, 0)
    if text[start : start + 1] == "[":
        return _read_array(text, start, name, wish, problems)
    try:
        value = _LENIENT.decode(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            table = read_jsonl(
                io.BytesIO(text.encode("utf-8", "surrogatepass")), name, wish, problems
            )
            table.notes.append("one object per line, read as JSONL")
            return table
        problem = RowProblem(
            "not valid JSON", error.msg, column=error.colno, mend=_hint(text, error)
        )
        problems.add(problem, name, error.lineno, excerpt=around(text, error.pos), fatal=True)
        return Table()
    except (RecursionError, ValueError) as error:
        problems.add(RowProblem("not usable JSON", str(error)[:80]), name, fatal=True)
        return Table()
    return _read_listed(value, text, name, wish, problems)


def _read_listed(value: Any, text: str, name: str, wish: Wish, problems: Problems) -> Table:
    lists = _lists_in(text) if isinstance(value, dict) else {}
    keys = [key for key in _LIST_KEYS if key in lists]
    if len(keys) != 1:
        found = ", ".join(list(value)[:10]) if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"{name} holds no list of rows; found: {found}",
            expected='an array of objects, or {"data": [...]}',
        )
    table = _read_array(text, lists[keys[0]], name, wish, problems)
    table.notes.append(f'rows of "{keys[0]}"')
    return table


def _lists_in(text: str) -> dict[str, int]:
    """Where the lists of an object begin; `text` is known to be valid."""
    found: dict[str, int] = {}
    position = _match_end(_GAP, text, text.index("{") + 1)
    while text[position] != "}":
        key, position = _LENIENT.raw_decode(text, position)
        begin = _match_end(_GAP, text, _match_end(_GAP, text, position) + 1)  # behind the colon
        if text[begin] == "[":
            found[key] = begin
        position = _match_end(_GAP, text, _LENIENT.raw_decode(text, begin)[1])
        if text[position] == ",":
            position = _match_end(_GAP, text, position + 1)
    return found


def _match_end(pattern: re.Pattern, text: str, start: int) -> int:
    found = pattern.match(text, start)
    return found.end() if found else start


def _read_array(text: str, start: int, name: str, wish: Wish, problems: Problems) -> Table:
    """Read element by element, so that each row has its line and one bad row hides no other."""
    table, line, counted = Table(), 1, 0
    position = _match_end(_GAP, text, start + 1)
    if text[position : position + 1] == "]":
        return table
    while not wish.reached(table):
        position = _match_end(_GAP, text, position)
        line, counted = line + text.count("\n", counted, position), position
        try:
            position = _read_element(text, position, name, line, table, problems)
            position = _match_end(_GAP, text, position)
            separator = text[position : position + 1]
            if separator == "]":
                break
            if separator != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
            position += 1
        except (json.JSONDecodeError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            detail = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            column = at - text.rfind("\n", 0, at)
            mend = "a comma stands before the closing bracket" if text[at : at + 1] in "]}" else ""
            problem = RowProblem("not valid JSON", detail, column=column, mend=mend)
            problems.add(
                problem,
                name,
                text.count("\n", 0, at) + 1,
                excerpt=around(text, at),
                fatal=True,
            )
            break
    return table


def _read_element(
    text: str, position: int, name: str, line: int, table: Table, problems: Problems
) -> int:
    try:
        value, end, control = _decode_row(text, position, alone=False)
        keep(table, value, line, control)
        return end
    except RowProblem as problem:
        problems.add(problem, name, line, excerpt=text[position : position + 500])
        return _LENIENT.raw_decode(text, position)[1]
