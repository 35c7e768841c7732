"""Which columns mean what: the shape of some rows is found, or as asked for, and stated."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lorica.data.problems import RowProblem, counted
from lorica.data.shapes import (
    ALPACA_CHAT,
    ANSWERS,
    CANONICAL,
    CHECKED,
    CONVERSATIONAL,
    CONVERSIONS,
    SHAPES,
    Row,
    Shape,
    answers_of,
    chat_shape,
    value_of,
)
from lorica.errors import DataError, nearest


class NoTarget(DataError):
    """The rows have inputs but nothing to learn, as in the public test files of GLUE."""


@dataclass(frozen=True)
class Plan:
    """How the rows of one input become canonical: a shape and the names its columns have there.

    Attributes:
        shape: the shape found or asked for.
        names: column of the shape -> column of the rows (equal but for case, or as mapped).
        seen: all columns of the rows.
        hidden: further columns whose name the canonical row needs for something else (left out).
    """

    shape: Shape
    names: Mapping[str, str]
    seen: tuple[str, ...]
    hidden: tuple[str, ...]

    def statement(self, wanted: str | None = None) -> str:
        """Such as `3 columns seen: instruction, input, output -> alpaca -> prompt/completion`.

        `wanted`: a canonical format that the rows are converted to in the end.
        """
        used = set(self.names.values())
        further = [name for name in self.seen if name not in used and name not in self.hidden]
        made = [name for name in self.shape.columns.values() if name]
        need, may = CANONICAL[self.shape.format]
        columns = "/".join([*need[:-1], *(name for name in may if name in made), need[-1]])
        chain = [f"{counted(len(self.seen), 'column')} seen: {_listed(self.seen)}"]
        chain += [self.shape.name] if self.shape.name != columns else []
        chain.append(columns)
        if wanted not in (None, self.shape.format):
            chain.append("/".join(CANONICAL[wanted][0]))
        text = " -> ".join(chain)
        if further:
            text += f"; kept as they are: {_listed(further)}"
        if self.hidden:
            text += f"; left out, the name is needed: {_listed(self.hidden)}"
        return text


def _listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name if len(name) <= 60 else f"{name[:57]}..." for name in names[:most]) + more


def columns_of(rows: Iterable[Row]) -> tuple[str, ...]:
    """The columns of all rows, in order of appearance."""
    seen: dict[str, None] = {}
    for row in rows:
        if not row.keys() <= seen.keys():
            seen.update(dict.fromkeys(row))
    return tuple(seen)


def plan(
    rows: list[Row], *, format: str | None = None, columns: Mapping[str, str] | None = None
) -> Plan:
    """Decide how `rows` are to be understood.

    Args:
        rows: at least one row.
        format: a canonical format or the name of a shape; None finds out.
        columns: canonical column -> source column; the format follows from the canonical names.

    Raises:
        NoTarget: there are inputs, but nothing to learn.
        DataError: no shape fits, or a name is unknown; lists the columns found and the nearest.
    """
    seen = columns_of(rows)
    if columns:
        shape = _mapped(columns, seen, format)
    else:
        shape = _found(seen, format)
        shape = _refined(shape, rows, seen, format)
    names = _names(shape, seen)
    used = set(names.values())
    canonical = {*CANONICAL[shape.format][0], *CANONICAL[shape.format][1]}
    hidden = tuple(name for name in seen if name in canonical and name not in used)
    if shape.format == "chat":
        hidden = tuple(name for name in hidden if name != "tools")
    return Plan(shape, names, seen, hidden)


def _names(shape: Shape, seen: tuple[str, ...]) -> dict[str, str]:
    """Column of the shape -> its name in the rows: exact, or equal but for case and spaces."""
    folded = {name.strip().lower(): name for name in reversed(seen)}
    return {
        column: column if column in seen else folded[column.lower()]
        for column in shape.every()
        if column in seen or column.lower() in folded
    }


def _fits(shape: Shape, seen: tuple[str, ...]) -> bool:
    names = _names(shape, seen)
    return all(column in names for column in shape.columns)


def _found(seen: tuple[str, ...], format: str | None) -> Shape:
    if format is not None and format not in {*CANONICAL, *(shape.name for shape in SHAPES)}:
        known = [*CANONICAL, *dict.fromkeys(shape.name for shape in SHAPES)]
        close = nearest(format, known)
        raise DataError(
            f"format {format!r} is not known" + (f"; did you mean {close!r}?" if close else ""),
            expected=", ".join(known[:12]) + " ...",
        )
    fitting = [shape for shape in SHAPES if _fits(shape, seen)]
    wanted = [shape for shape in fitting if format in (None, shape.format, shape.name)]
    if wanted:
        return wanted[0]
    related = [shape for shape in fitting if (shape.format, format) in CONVERSIONS]
    if related:
        return related[0]
    raise _no_shape(seen, format)


def _refined(shape: Shape, rows: list[Row], seen: tuple[str, ...], format: str | None) -> Shape:
    """Alpaca rows with a system text or a history, and prompts that are messages, become chat."""
    names = _names(ALPACA_CHAT, seen)
    if shape.name == "alpaca":
        extra = [names[key] for key in ("system", "history") if key in names]
        filled = any(row.get(name) for row in rows for name in extra)
        if filled or (extra and format == "chat"):
            return ALPACA_CHAT
    if shape.name == "prompt/completion":
        name = _names(shape, seen)["prompt"]
        if any(isinstance(row.get(name), list) for row in rows[:100]):
            return CONVERSATIONAL
    return shape


def _no_shape(seen: tuple[str, ...], format: str | None) -> DataError:
    found = f"columns found: {_listed(seen, 20)}"
    if {"chosen", "rejected"} <= {name.strip().lower() for name in seen}:
        return DataError(
            "these are pairs of a preferred and a rejected answer, on which nothing here trains; "
            f"{found}",
            mend="train on the preferred ones: "
            'columns={"prompt": "prompt", "completion": "chosen"}',
        )
    shapes = [shape for shape in SHAPES if format in (None, shape.format, shape.name)]
    for shape in shapes:
        names = _names(shape, seen)
        inputs = [column for column in shape.columns if column != shape.target]
        if inputs and all(column in names for column in inputs):
            rest = [name for name in seen[:100] if name not in names.values()]
            near = nearest(shape.target, rest)
            hint = f"; {near!r} may be meant" if near else ""
            return NoTarget(
                f"no column {shape.target!r} beside {_listed(names.values())}; {found}{hint}",
                expected="a column with what is to be learned",
                mend='name it, such as columns={"prompt": "...", "completion": "..."}',
            )
    known = dict.fromkeys(column for shape in shapes for column in shape.columns)
    close = {name: nearest(name, known) for name in seen[:100] if name not in known}
    hints = [f"{name[:60]!r} is near {match!r}" for name, match in close.items() if match]
    return DataError(
        f"the columns do not say what to learn from what; {found}",
        problems=hints[:5],
        expected="messages | prompt, completion | text | text, label | source, target",
        mend='map them, such as columns={"prompt": "...", "completion": "..."}; a CSV or TSV file '
        'without a header is mapped by places counted from 0: columns={"text": "3", "label": "1"}',
    )


def _mapped(columns: Mapping[str, str], seen: tuple[str, ...], format: str | None) -> Shape:
    known = [
        *dict.fromkeys(n for need, may in CANONICAL.values() for n in (*need, *may)),
        *ANSWERS,
    ]
    unknown = [name for name in columns if name not in known]
    if unknown:
        close = {name: nearest(name, known) for name in unknown}
        raise DataError(
            "columns are mapped to names that are not known",
            problems=[f"{a!r}" + (f"; did you mean {b!r}?" if b else "") for a, b in close.items()],
            expected=f"names among {', '.join(known)}, each with the column that holds it",
        )
    given = set(columns) - set(ANSWERS)
    formats = [
        name
        for name, (need, may) in CANONICAL.items()
        if set(need) <= given <= {*need, *may} and format in (None, name)
    ]
    if not formats:
        raise DataError(
            f"columns for {', '.join(sorted(given)) or 'nothing'} make no format",
            expected="; ".join(
                f"{name}: {', '.join(need)}" for name, (need, _) in CANONICAL.items()
            ),
        )
    _check_mapped(columns, seen, CANONICAL[formats[0]][0][-1])
    swapped = {source: canonical for canonical, source in columns.items()}
    target = columns[CANONICAL[formats[0]][0][-1]]
    if formats[0] == "chat":
        return chat_shape(columns["messages"])
    return Shape("as mapped", formats[0], swapped, target)


def _check_mapped(columns: Mapping[str, str], seen: tuple[str, ...], target: str) -> None:
    if len(set(columns.values())) != len(columns):
        raise DataError("a column is mapped to two names", expected="one name for each column")
    missing = [source for source in columns.values() if source not in seen]
    if missing:
        by_place = all(place.isdigit() for place in columns.values())
        kind = NoTarget if columns[target] in missing or by_place else DataError
        close = {name: nearest(name, seen) for name in missing}
        raise kind(
            "mapped columns are not in the data",
            problems=[f"{a!r}" + (f"; did you mean {b!r}?" if b else "") for a, b in close.items()],
            expected=f"names among {_listed(seen, 20)}",
        )


def converter(plan: Plan) -> Callable[[Row], Row]:
    """The function that makes a canonical row of a source row.

    Raises (the function):
        RowProblem: a missing, empty or wrongly typed value.
    """
    shape = plan.shape
    dropped = {*plan.names.values(), *plan.hidden}
    required = [plan.names[column] for column in shape.columns]
    renamed = [(canonical, plan.names[source]) for source, canonical in shape.columns.items()]

    def convert(row: Row) -> Row:
        for name in required:
            if name not in row:
                raise _missing(name, row)
        if shape.convert is not None:
            result = shape.convert(row, plan.names)
        else:
            result = {}
            for canonical, source in renamed:
                value = row[source]
                if canonical in CHECKED or type(value) is not str or not value.strip():
                    value = value_of(row, source, canonical)  # the rare and the wrong
                result[canonical] = value
        if len(row) > len(required):
            result.update((key, value) for key, value in row.items() if key not in dropped)
            for key in ANSWERS:
                if key in row and key not in dropped:
                    result[key] = answers_of(row[key], key)
        return result

    return convert


def _missing(name: str, row: Row) -> RowProblem:
    close = nearest(name, list(row)[:100])
    hint = f"; {close!r} may be meant" if close else ""
    return RowProblem(
        f"no column {name!r}",
        f"found: {_listed(row)}{hint}",
        mend="name the columns alike in all rows",
    )


def conversion(found: str, wanted: str) -> Callable[[Row], Row] | None:
    """The function from one canonical format to another; None where they are the same.

    Raises:
        DataError: there is no such conversion.
    """
    if found == wanted:
        return None
    if (found, wanted) not in CONVERSIONS:
        ways = ", ".join(f"{a} -> {b}" for a, b in CONVERSIONS)
        raise DataError(f"rows of format {found} cannot become {wanted}", expected=ways)
    return CONVERSIONS[found, wanted]
