"""Every test that docs/reliability.md names is there, and every figure finds a place in it."""

import re
from pathlib import Path

import pytest

from benchmark import script

FAULTS = Path(__file__).parent
written = script("reliability_page")


def test_all_thirty_faults_are_there():
    assert [row[0] for row in written.ROWS] == [f"F-{n:02d}" for n in range(1, 31)]


@pytest.mark.parametrize("row", written.ROWS, ids=lambda row: row[0])
def test_the_named_tests_exist(row):
    file, _, words = row[3].partition(":")
    names = re.findall(r"^def (test_\w+)", (FAULTS / file).read_text(), re.M)
    assert names
    for word in filter(None, (word.strip() for word in words.split(","))):
        assert any(word in name for name in names), f"{file} has no test of {word}"


def test_figures_of_others_find_a_place():
    told = written.text_of({"fuzz": {"header": {"cases": 9, "crashes": 0}, "seconds": 1}})
    assert "### Fuzz" in told and "- header: cases 9, crashes 0" in told
