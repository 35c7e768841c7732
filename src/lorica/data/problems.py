"""All problems of one input at once: a count per kind and the first three places of each."""

import json
from dataclasses import dataclass, field

from lorica.data.secrets import hidden
from lorica.errors import DataError

SHOWN = 3  # places shown per kind
EXCERPT = 60  # characters
LONGEST = 300  # of what is wrong with a row
SEARCHED = 400  # characters beyond an excerpt in which a key is still known by its form


class RowProblem(Exception):
    """One row cannot be used. Caught by the reader, which adds the place."""

    def __init__(self, kind: str, detail: str = "", *, mend: str = "", column: int | None = None):
        self.kind, self.detail, self.mend, self.column = kind, detail, mend, column
        super().__init__(kind)


@dataclass
class _Kind:
    mend: str
    count: int = 0
    shown: list[str] = field(default_factory=list)


class Problems:
    """Collects what is wrong with an input, in bounded memory.

    A problem of a row may be forgiven by `max_bad_rows`; a fatal one (encoding, header, a file cut
    off in the middle) may not, because the rows behind it are unknown.
    """

    def __init__(self) -> None:
        self.fatal = False
        self.num_bad_rows = 0
        self.bad_lines: list[int] = []
        self._kinds: dict[str, _Kind] = {}

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def add(
        self,
        problem: RowProblem,
        file: str,
        line: int | None = None,
        *,
        excerpt: str = "",
        fatal: bool = False,
    ) -> None:
        name, detail = (_clipped(text) for text in (problem.kind, problem.detail))
        kind = self._kinds.setdefault(name, _Kind(problem.mend))
        kind.count += 1
        self.fatal |= fatal
        if not fatal:
            self.num_bad_rows += 1
            if line is not None and len(self.bad_lines) < 5:
                self.bad_lines.append(line)
        if len(kind.shown) < SHOWN:
            place = ":".join(str(part) for part in (file, line, problem.column) if part is not None)
            parts = [place, detail, f"near {show(excerpt)}" if excerpt else ""]
            kind.shown.append(" ".join(part for part in parts if part))

    def lines(self) -> list[str]:
        """One text per kind, most frequent first; each may span several lines."""
        texts = []
        for name, kind in sorted(self._kinds.items(), key=lambda item: -item[1].count):
            head = f"{name} ({kind.count:,}x)" if kind.count > 1 else name
            more = [f"and {kind.count - SHOWN:,} more"] if kind.count > SHOWN else []
            mend = [f"mend: {kind.mend}"] if kind.mend else []
            texts.append("\n      ".join([head, *kind.shown, *more, *mend]))
        return texts

    def error(self, name: str) -> DataError:
        """The error that shows everything collected so far."""
        if self.fatal:
            return DataError(f"{name} cannot be read", problems=self.lines())
        count = self.num_bad_rows
        return DataError(
            f"{name}: {counted(count, 'row')} cannot be used",
            problems=self.lines(),
            mend=f"mend the rows, or let them be left out, and counted, by max_bad_rows={count}",
        )


def _clipped(text: str) -> str:
    """Names of columns and roles are in it, of any length."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def counted(number: int, noun: str) -> str:
    """`1 row`, `2,431 rows`."""
    return f"{number:,} {noun}{'s' if number != 1 else ''}"


def show(text: str, length: int = EXCERPT) -> str:
    """A short quoted excerpt, with everything that could disturb a terminal escaped, and without
    keys: what is said of records goes into logs.
    """
    whole = hidden(text[: length + SEARCHED])
    shown = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in whole[:length])
    return f"`{shown}{'...' if len(whole) > length else ''}`"


def around(text: str, position: int, before: int = 20) -> str:
    """A text from a little before a position on; a key that begins further in front is not cut in
    two, for half of it would not be known as a key.
    """
    first = max(0, position - before - SEARCHED)
    return hidden(text[first:position])[-before:] + text[position : position + EXCERPT + SEARCHED]
