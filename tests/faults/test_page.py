"""docs/reliability.md is what its script writes, and every test that it names is there."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT, RESULTS = ROOT / "benchmarks/reliability_page.py", "benchmarks/results/reliability.json"

if not SCRIPT.exists():
    pytest.skip("the benchmarks are not part of this distribution", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("reliability_page", SCRIPT)
assert _spec is not None and _spec.loader is not None
written = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(written)


def test_all_thirty_faults_are_there():
    assert [row[0] for row in written.ROWS] == [f"F-{n:02d}" for n in range(1, 31)]


@pytest.mark.parametrize("row", written.ROWS, ids=lambda row: row[0])
def test_the_named_tests_exist(row):
    file, _, words = row[3].partition(":")
    names = re.findall(r"^def (test_\w+)", (ROOT / "tests/faults" / file).read_text(), re.M)
    assert names
    for word in filter(None, (word.strip() for word in words.split(","))):
        assert any(word in name for name in names), f"{file} has no test of {word}"


def test_the_page_is_that_of_the_figures():
    figures = json.loads((ROOT / RESULTS).read_bytes())
    assert (ROOT / "docs/reliability.md").read_text(encoding="utf-8") == written.page(figures)


def test_figures_of_others_find_a_place():
    told = written.page({"fuzz": {"header": {"cases": 9, "crashes": 0}, "seconds": 1}})
    assert "### Fuzz" in told and "- header: cases 9, crashes 0" in told
