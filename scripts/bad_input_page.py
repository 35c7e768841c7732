"""Write docs/bad-input.md: every bad input of the tests, with what Lorica says to it.

    python scripts/bad_input_page.py

The cases are those of tests/bad_input; each is given to Lorica here, and what it says is the page.
The figures of the fuzzer come from benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", RUST_BACKTRACE="0")  # before the libraries are imported
ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from bad_input.case import Case, said, shown  # noqa: E402
from bad_input.cases import NOT_HELD, PARTLY, TABLES  # noqa: E402

PAGE, FIGURES = ROOT / "docs/bad-input.md", ROOT / "benchmarks/results/fuzz.json"
HEAD = """# What Lorica says to bad input

Data, settings, adapters, models and templates come from strangers, or were made in a hurry. Each
row of these tables is a test: `pytest tests/bad_input -k "D-07"` runs those of a row. What is
refused is refused before training begins, with exit code 2 (3 where a check of the records
refuses), with all problems at once, and without a file left; what is accepted says what was done.

This page is written by `python scripts/bad_input_page.py`, which gives every input to Lorica and
writes down what it says (the beginning of it).
"""


def cell(text: str) -> str:
    """Text for a cell of a table."""
    printed = "".join(c if c.isprintable() else f"\\\\x{ord(c):02x}" for c in text)
    return printed.replace("|", "\\|").replace("<", "&lt;")


def line(case: Case) -> str:
    """A row of a table; the input is given to Lorica for it."""
    with tempfile.TemporaryDirectory() as folder:
        text = said(case, Path(folder))
    return f"| {case.row} | {cell(case.given)} | {verdict(case)} | {cell(shown(text))} |"


def verdict(case: Case) -> str:
    return "accepted, told" if case.error is None else "refused"


def fuzzed(figures: dict[str, Any]) -> list[str]:
    """The table of the fuzzer."""
    lines = ["| reader | inputs | seconds | slowest | refused | kinds of answers | findings left |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, own in figures.items():
        lines.append(
            f"| {name} | {own['executions']:,} | {own['seconds']} | {own['slowest_seconds']} s | "
            f"{own['refused']:,} | {own['outcomes']} | {own['findings']} |"
        )
    return lines


def page() -> str:
    """The whole text."""
    number = sum(len(cases) for _, cases in TABLES.values())
    lines = [HEAD, f"{number} inputs:"]
    for letter, (title, cases) in TABLES.items():
        lines += ["", f"## {letter}: {title}", "", "| row | given | | what Lorica says |"]
        lines += ["|---|---|---|---|", *(line(case) for case in cases)]
    lines += ["", "## What is not held", ""]
    lines += [f"- {row}: {why}." for row, why in sorted({**NOT_HELD, **PARTLY}.items())]
    if FIGURES.exists():
        figures = json.loads(FIGURES.read_bytes())
        lines += ["", "## Fuzzed", "", FUZZED, *fuzzed(figures), "", MENDED]
    return "\n".join(lines) + "\n"


FUZZED = """`python benchmarks/fuzz.py` throws changed bytes at five readers. Whatever they are,
only a `LoricaError` may come out, within five seconds, in sentences of at most 3,000 letters, and
without a half-written file. What once broke a reader lies in `tests/corpus`, and
`tests/bad_input/test_corpus.py` reads it again.
"""


MENDED = """Found by it so far, mended, and kept in the corpus:

- checkpoints whose hashes fit and whose contents do not: nine kinds of exceptions came through
  (broken JSON, unknown counters, numbers for texts, numbers of 5,000 digits, 2,000 levels);
- a CSV header of thousands of columns with one twice, and settings with 1,000 open brackets: time
  that grew with the square, or faster;
- a Parquet file with a column name that is not UTF-8: an exception of the library came through;
- names of 5,000 letters (of columns, roles, tags of templates and of YAML) that were repeated in
  full in the message."""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
