"""`lorica demo`, with few steps."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

from lorica.cli.demo import SETTINGS
from lorica.cli.demo_mixtures import STYLE, WEIGHTS


@pytest.fixture
def little(monkeypatch):
    """Few records, and short answers."""
    monkeypatch.setattr("lorica.cli.material.FACTS", {"train": 80, "valid": 8, "test": 6})
    monkeypatch.setattr("lorica.cli.demo.SETTINGS", {**deepcopy(SETTINGS), "max_new_tokens": 8})
    monkeypatch.setattr("lorica.cli.demo.MIXED_RECORDS", 5)


def test_demo(lorica, little):
    done = lorica("demo", "--max-steps", "2")
    assert done.code == 0, done.err
    found = json.loads(Path("runs/demo/run.json").read_text(encoding="utf-8"))
    assert next(iter(found["scores"])) == "slot_accuracy"
    assert done.out.count("  before     ") == 3 and "lorica chat runs/demo" in done.out
    mixtures = found["mixtures"]["mixtures"]
    assert [tuple(one["weights"]) for one in mixtures] == list(WEIGHTS)
    for mixture in mixtures:
        assert {*mixture["scores"]} == {"slot_accuracy", "style_marks"}
        assert mixture["scores"]["style_marks"]["num_records"] == 5
    shares = {
        (f, s): one["scores"]["style_marks"]["value"]
        for one in mixtures
        for f, s in [one["weights"]]
    }
    assert shares[1, 0] == 0 and shares[0, 1] == 1
    (head,) = [line for line in done.out.splitlines() if line.split()[:2] == ["facts", "style"]]
    assert head.endswith("slot accuracy   with style marks")
    page = Path("runs/demo/report.html").read_text(encoding="utf-8")
    assert '<h2 id="mixtures">' in page and "facts 0.5" in page
    answers = page.count('<td class="text">')  # a word without end is broken there, not the page
    assert answers == len(mixtures)


def test_the_demo_again_gives_the_same_figures_as_json(lorica, little):
    first, again = (lorica("demo", "--max-steps", "1", "--json") for _ in range(2))
    assert first.code == again.code == 0, again.err
    kinds = [row["type"] for row in first.rows if row["type"] != "work"]
    assert kinds[-2:] == ["finish", "mixtures"]
    assert first.rows[-1] == again.rows[-1]


def test_the_style_names_no_place_of_the_machine_it_was_made_on():
    for file in STYLE.glob("*.json"):
        assert json.loads(file.read_text(encoding="utf-8")) and "/tmp" not in file.read_text()


def test_the_demo_spares_other_runs(lorica, finished_run):
    before = (finished_run / "run.json").read_bytes()
    done = lorica("demo", "--output-dir", finished_run)
    assert done.code == 2 and "already holds a run" in done.err
    assert (finished_run / "run.json").read_bytes() == before
