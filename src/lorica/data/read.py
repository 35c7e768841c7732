"""Read data: any file or folder of rows -> a `Dataset` in one of five canonical formats.

    dataset = read("sql.jsonl")            # .json .csv .tsv .parquet .txt, a folder, "-", a hub id
    splits = read_splits("glue/SST-2")     # {"train": ..., "valid": ..., "test": ...}
    print(dataset.statement)               # what was detected, converted, and left out

Nothing is guessed in silence: every decision is in `statement`, and a row that cannot be used is an
error with its file and line, all kinds of errors at once.
"""

import io
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorica.data import formats
from lorica.data.dataset import Dataset, digest_of, group_references, identities, make_dataset
from lorica.data.formats import NoTarget
from lorica.data.hub import hub_tables
from lorica.data.locate import Located, locate
from lorica.data.problems import Problems, RowProblem, counted
from lorica.data.rows import READERS, check_rows, read_file
from lorica.data.shapes import CANONICAL, Row
from lorica.data.table import Table, Wish
from lorica.errors import DataError

__all__ = ["Dataset", "digest_of", "from_rows", "group_references", "read", "read_splits"]

SAMPLE_SEED = 0  # of `path#500`


@dataclass(frozen=True)
class _Request:
    """What the caller of `read` asked for."""

    format: str | None
    columns: Mapping[str, str] | None
    limit: int | None
    max_bad_rows: int

    def wish(self) -> Wish:
        # columns given by place mean that the file has no header
        places = list((self.columns or {}).values())
        return Wish(self.limit, header=not (places and all(place.isdigit() for place in places)))


@dataclass
class _Gathered:
    """The tables of one split before the columns are understood."""

    name: str
    tables: list[tuple[str, Table]] = field(default_factory=list)

    def rows(self) -> list[Row]:
        return [row for _, table in self.tables for row in table.rows]

    def origins(self) -> list[tuple[str, int]]:
        return [(name, line) for name, table in self.tables for line in table.lines]

    def notes(self) -> list[str]:
        several = len(self.tables) > 1
        notes = [f"{len(self.tables)} files"] if several else []
        for name, table in self.tables:
            prefix = f"{Path(name).name}: " if several else ""
            notes += [prefix + note for note in table.notes]
        controls = sum(table.num_control for _, table in self.tables)
        if controls:
            notes.append(f"{counted(controls, 'row')} with control characters (kept)")
        return notes


def read(
    path: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    max_bad_rows: int = 0,
) -> Dataset:
    """Read one set of rows.

    Args:
        path: a file (.jsonl .ndjson .json .csv .tsv .parquet .txt), a folder of such files, "-" for
            standard input, or a hub id `org/name[:config][@revision]`. `path#500` is a sample of
            500 rows, the same one every time.
        format: a canonical format, or the name of a shape ("alpaca", "ShareGPT"). None finds out.
        columns: canonical column -> source column, such as {"prompt": "mr", "completion": "ref"};
            in CSV and TSV files without a header the source columns are places counted from 0.
        limit: read the first rows only.
        max_bad_rows: so many unusable rows are left out and counted instead of being an error.

    Raises:
        DataError: nothing to read, unusable rows, unclear columns, or a folder with several splits
            (use `read_splits`).
        MissingPackage: pyarrow for Parquet, datasets for hub ids.
    """
    located = locate(path)
    request = _request(format, columns, limit, max_bad_rows)
    gathered = _hub(located, request) if located.hub else None
    splits = list(gathered or located.groups)
    if len(splits) > 1:
        raise DataError(
            f"{located.name} holds the splits {', '.join(splits)}",
            expected="one set of rows",
            mend="read it with read_splits, or name one of its files",
        )
    if gathered:
        return _finish(next(iter(gathered.values())), located, request, Problems())
    return _read_groups(located, splits[0] if splits else "", request)


def read_splits(
    path: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    max_bad_rows: int = 0,
) -> dict[str, Dataset]:
    """Read all splits of an input; the keys are among "train", "valid" and "test".

    A folder has splits where files or folders in it are named so (train, training; valid,
    validation, val, dev, eval; test). Anything else is one set and comes back as "train". A test
    split without targets (the public test files of GLUE) is left out, and the statement says so.

    Args, Raises: as `read`; `limit` and `max_bad_rows` hold for each split.
    """
    located = locate(path)
    request = _request(format, columns, limit, max_bad_rows)
    hub = _hub(located, request) if located.hub else None
    found: dict[str, Dataset] = {}
    notes: list[str] = []
    for split in hub or located.groups or {"": []}:
        try:
            if hub:
                dataset = _finish(hub[split], located, request, Problems())
            else:
                dataset = _read_groups(located, split, request)
        except NoTarget as error:
            if split != "test":
                raise
            if len(hub or located.groups) == 1:
                raise
            notes.append(f"the test split is left out: {error.what}")
            continue
        found[split or "train"] = dataset
    order = [split for split in ("train", "valid", "test") if split in found]
    first = found[order[0]].format if order else ""
    for split in order:
        if found[split].format != first:
            raise DataError(
                f"{located.name}: {order[0]} is of format {first}, "
                f"{split} of {found[split].format}",
                mend="give format=... or columns=...",
            )
    notes += _overlaps(found)
    return {split: _noted(found[split], notes) for split in order}


def from_rows(
    rows: Sequence[Mapping[str, Any]],
    *,
    name: str = "rows",
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Dataset:
    """A dataset of rows that are in memory, under the same rules as rows of a file."""
    problems = Problems()
    request = _request(format, columns, None, 0)
    table = check_rows([dict(row) for row in rows], name, problems, request.wish())
    return _finish(_Gathered(name, [(name, table)]), Located(name, {}), request, problems)


def _request(
    format: str | None, columns: Mapping[str, str] | None, limit: int | None, max_bad_rows: int
) -> _Request:
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}", expected="at least 1")
    if max_bad_rows < 0:
        raise DataError(f"max_bad_rows is {max_bad_rows}", expected="0 or more")
    return _Request(format, columns, limit, max_bad_rows)


def _hub(located: Located, request: _Request) -> dict[str, _Gathered]:
    assert located.hub is not None
    tables = hub_tables(located.hub, request.limit)
    return {
        split: _Gathered(f"{located.name} {split}", [(f"{located.name}/{split}", table)])
        for split, table in tables.items()
    }


def _read_groups(located: Located, split: str, request: _Request) -> Dataset:
    """Read the best group of files whose rows have something to learn."""
    if located.standard_input:
        problems = Problems()
        gathered = _standard_input(request, problems)
        return _finish(gathered, located, request, problems)
    groups = located.groups[split]
    passed: list[str] = []
    for number, files in enumerate(groups, start=1):
        problems = Problems()
        try:
            gathered = _gather(files, request, problems)
            rest = [file.name for files in groups[number:] for file in files]
            notes = [*passed, *([f"not read: {', '.join(rest)}"] if rest else [])]
            return _noted(_finish(gathered, located, request, problems), notes)
        except NoTarget:
            if number == len(groups):
                raise
            names = ", ".join(file.name for file in files)
            passed.append(f"{names} has no targets and was passed over")
    raise AssertionError("every split has a group of files")


def _gather(files: list[Path], request: _Request, problems: Problems) -> _Gathered:
    name = str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
    gathered, left = _Gathered(name), request.limit
    for file in files:
        if left == 0:
            break
        table = read_file(file, Wish(left, request.wish().header), problems)
        gathered.tables.append((str(file), table))
        left = None if left is None else left - len(table.rows)
    return gathered


def _standard_input(request: _Request, problems: Problems) -> _Gathered:
    raw = sys.stdin.buffer.read()
    ending = _sniff(raw, request)
    name = "<standard input>"
    table = READERS[ending](io.BytesIO(raw), name, request.wish(), problems)
    table.notes.append(f"read as {ending[1:].upper()}")
    return _Gathered(name, [(name, table)])


def _sniff(raw: bytes, request: _Request) -> str:
    """The kind of standard input: JSON by its first sign, CSV or TSV by a header that is known."""
    head = raw[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
    if head[:1] in (b"{", b"["):
        return ".jsonl" if head[:1] == b"{" else ".json"
    first = head.split(b"\n", 1)[0].rstrip(b"\r").decode("utf-8", "replace")
    for ending, delimiter in ((".tsv", "\t"), (".csv", ","), (".csv", ";")):
        header = [cell.strip(' "') for cell in first.split(delimiter)]
        if len(header) > 1:
            if not request.wish().header:
                return ending
            try:
                formats.plan(
                    [dict.fromkeys(header, "")], format=request.format, columns=request.columns
                )
                return ending
            except DataError:
                continue
    return ".txt"


def _finish(
    gathered: _Gathered, located: Located, request: _Request, problems: Problems
) -> Dataset:
    """Rows as they stand -> canonical rows, or one error with everything that is wrong."""
    rows, origins = gathered.rows(), gathered.origins()
    notes = gathered.notes() + list(located.notes)
    if not rows:
        if problems:
            raise problems.error(gathered.name)
        raise DataError(f"{gathered.name} holds no rows", expected="at least one row")
    plan = _understood(rows, gathered.name, request, problems)
    kept, places = _convert(plan, rows, origins, problems)
    if problems and (problems.fatal or problems.num_bad_rows > request.max_bad_rows or not kept):
        raise problems.error(gathered.name)
    if problems:
        lines = ", ".join(map(str, problems.bad_lines))
        notes.append(
            f"{counted(problems.num_bad_rows, 'unusable row')} left out (first lines: {lines})"
        )
    wanted = _wanted_format(request.format, plan.shape.format)
    statement = plan.statement(wanted)
    if change := formats.conversion(plan.shape.format, wanted):
        kept = [change(row) for row in kept]
    if located.sample is not None and located.sample < len(kept):
        notes.append(f"{located.sample:,} of {len(kept):,} rows sampled (seed {SAMPLE_SEED})")
        chosen = sorted(random.Random(SAMPLE_SEED).sample(range(len(kept)), located.sample))
        kept, places = [kept[i] for i in chosen], [places[i] for i in chosen]
    if doubles := len(kept) - len(identities(kept, wanted)):
        notes.append(f"{counted(doubles, 'row')} repeating an earlier one (kept)")
    statement = f"{gathered.name}: {counted(len(kept), 'row')}; {statement}"
    return make_dataset(kept, wanted, places, "; ".join([statement, *notes]))


def _understood(rows: list[Row], name: str, request: _Request, problems: Problems) -> formats.Plan:
    try:
        return formats.plan(rows, format=request.format, columns=request.columns)
    except DataError as error:
        lines = [*error.problems, *problems.lines()]
        kind = type(error)
        raise kind(
            f"{name}: {error.what}", expected=error.expected, mend=error.mend, problems=lines
        ) from None


def _wanted_format(asked: str | None, found: str) -> str:
    return asked if asked in CANONICAL else found


def _convert(
    plan: formats.Plan, rows: list[Row], origins: list[tuple[str, int]], problems: Problems
) -> tuple[list[Row], list[tuple[str, int]]]:
    convert = formats.converter(plan)
    kept: list[Row] = []
    places: list[tuple[str, int]] = []
    for row, (file, line) in zip(rows, origins, strict=True):
        try:
            kept.append(convert(row))
            places.append((file, line))
        except RowProblem as problem:
            problems.add(problem, file, line, excerpt=json.dumps(row, ensure_ascii=False))
    return kept, places


def _overlaps(found: dict[str, Dataset]) -> list[str]:
    """Rows of valid and test that stand in train too: scores on them say little."""
    if "train" not in found or len(found) == 1:
        return []
    format = found["train"].format
    known = identities(found["train"].rows, format)
    notes = []
    for split in ("valid", "test"):
        if split in found:
            shared = len(known & identities(found[split].rows, format))
            if shared:
                notes.append(f"{counted(shared, 'different row')} of {split} also in train")
    return notes


def _noted(dataset: Dataset, notes: list[str]) -> Dataset:
    if not notes:
        return dataset
    statement = "; ".join([dataset.statement, *notes])
    return Dataset(dataset.rows, dataset.format, dataset.origins, statement, dataset.digest)
