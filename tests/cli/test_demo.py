"""`lorica demo`, with few steps."""

import json
from pathlib import Path


def test_demo(lorica, monkeypatch):
    monkeypatch.setattr("lorica.cli.material.FACTS", {"train": 80, "valid": 8, "test": 6})
    monkeypatch.setattr("lorica.cli.demo.SETTINGS", {**settings(), "max_new_tokens": 8})
    done = lorica("demo", "--max-steps", "2")
    assert done.code == 0, done.err
    found = json.loads(Path("runs/demo/run.json").read_text(encoding="utf-8"))
    assert next(iter(found["scores"])) == "slot_accuracy"
    assert done.out.count("  before     ") == 3 and "lorica chat runs/demo" in done.out
    again = lorica("demo", "--max-steps", "1", "--json")
    assert again.code == 0 and again.rows[-1]["type"] == "finish"


def settings() -> dict:
    from lorica.cli.demo import SETTINGS

    return SETTINGS


def test_the_demo_spares_other_runs(lorica, finished_run):
    before = (finished_run / "run.json").read_bytes()
    done = lorica("demo", "--output-dir", finished_run)
    assert done.code == 2 and "already holds a run" in done.err
    assert (finished_run / "run.json").read_bytes() == before
