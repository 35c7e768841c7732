"""Every row of the tables of bad input: what Lorica says to it, and that the page shows it."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from bad_input.case import said
from bad_input.cases import CASES, NOT_HELD, PARTLY, ROWS

ROOT = Path(__file__).parents[2]
SCRIPT, PAGE = ROOT / "scripts/bad_input_page.py", ROOT / "docs/bad-input.md"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_row(case, tmp_path):
    text = said(case, tmp_path)
    missing = [words for words in case.says if words not in text]
    assert not missing, f"{missing} not in: {text}"
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_every_row_of_the_tables_is_there():
    wanted = {f"{table}-{n:02d}" for table, number in ROWS.items() for n in range(1, number + 1)}
    held = {case.row for case in CASES}
    assert wanted - held == set(NOT_HELD)
    assert set(PARTLY) <= held


def test_names_are_different():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


def test_thirty_contradictions():
    assert sum(case.row == "C-08" for case in CASES) >= 30


@pytest.mark.skipif(not SCRIPT.exists(), reason="scripts are not part of this distribution")
def test_the_page_has_every_case():
    shown = re.findall(r"^\| ([DCAM](?:-\d\d)?) \| (.+?) \|", PAGE.read_text("utf-8"), re.M)
    spec = importlib.util.spec_from_file_location("bad_input_page", SCRIPT)
    assert spec is not None and spec.loader is not None
    written = importlib.util.module_from_spec(spec)
    sys.modules["bad_input_page"] = written
    spec.loader.exec_module(written)
    assert shown == [(case.row, written.cell(case.given)) for case in CASES]
    figures = "\n".join(written.fuzzed(json.loads(written.FIGURES.read_bytes())))
    assert figures in PAGE.read_text("utf-8")
