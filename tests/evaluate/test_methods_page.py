"""The figures of docs/methods.md and docs/parity.md, and how they are made."""

import json
from pathlib import Path

import pytest

from benchmark import BENCHMARKS, script

ROOT = Path(__file__).parents[2]
_ERRORS = ("outputs", "gradients", "returned", "first")


def side(*runs, method="lora", weight=1):
    """What the worker writes, from the values of the test records with each seed."""
    told = {"num_trainable": 7, "adapter_bytes": 9, "step_seconds": 0.5, "start_seconds": 0.0}
    return {
        "group": {"job": {"method": method, "method_settings": {}}},
        "learning_rate": 0.1,
        "tuning": {"0.1": 1.0},
        "peak_memory_bytes": 2**20,
        "runs": [{**told, "records": [[v, weight] for v in values]} for values in runs],
    }


def test_scores_are_means_over_seeds_with_intervals_around_them():
    figures = script("methods_score").figures
    found = {
        "lora": {"lorica": side([1, 0, 1, 1] * 25, [1, 0, 1, 0] * 25)},
        "full": {"lorica": side([1] * 100, [1] * 100, method="full")},
        "dora": {"lorica": side([1, 0, 1, 1] * 25, [1, 0, 1, 1] * 25, method="dora")},
    }
    told = figures(found)
    lora = told["lora"]["sides"]["lorica"]
    assert lora["by_seed"] == [0.75, 0.5] and lora["score"] == 0.625
    low, high = lora["interval"]
    assert 0.38 < low < 0.55 and 0.7 < high < 0.87  # either seed, give or take the records
    full = told["full"]["sides"]["lorica"]["against"]["lora"]
    assert full["difference"] == pytest.approx(0.375)
    assert full["interval"] == pytest.approx([1 - high, 1 - low]), "on the same drawn records"
    low, high = told["dora"]["sides"]["lorica"]["against"]["lora"]["interval"]
    assert low == pytest.approx(0.0) and high > 0.1, (
        "where seed 0 of LoRA is drawn twice they are equal"
    )


def test_a_loss_is_per_token():
    found = {"lora": {"lorica": side([2.0, 6.0], [4.0, 4.0], weight=2)}}
    found["lora"]["lorica"]["runs"][0]["records"][1][1] = 6
    told = script("methods_score").figures(found)["lora"]["sides"]["lorica"]
    assert told["by_seed"] == [8.0 / 8, 8.0 / 4]


def test_a_selection_is_compared_with_chance_of_the_same_grain():
    one, other = [[1, 0] * 8], [[1, 1] * 8]
    found = {
        "lora": {"lorica": side(*one)},
        "sparse: fisher": {"lorica": side(*other), "peft": side(*one)},
        "sparse: random": {"lorica": side(*one)},
        "sparse rows: fisher": {"lorica": side(*other)},
    }
    told = script("methods_score").figures(found)
    assert told["sparse: fisher"]["sides"]["lorica"]["against"]["random"]["difference"] == 0.5
    assert told["sparse: fisher"]["sides"]["peft"]["against"]["lorica"]["difference"] == -0.5
    assert "random" not in told["sparse: random"]["sides"]["lorica"]["against"]
    assert "random" not in told["sparse rows: fisher"]["sides"]["lorica"]["against"]


def test_names_in_the_picture_lie_on_nothing(monkeypatch):
    plot = script("methods_plot")
    boxes = []
    label = plot._label
    monkeypatch.setattr(plot, "_label", lambda *given: boxes.append(label(*given)))
    names = [name for names in plot.FAMILIES.values() for name in names] + ["sparse: random"]
    methods = {
        name: {
            "sides": {
                "lorica": {
                    "num_trainable": 1000 * (1 + number // 6),
                    "score": 0.6 + 0.01 * (number % 7),
                    "interval": [0.55, 0.7],
                }
            }
        }
        for number, name in enumerate(names)
    }
    figures = {"title": "A task", "metric": "accuracy", "methods": methods}
    text = plot.svg(figures)
    assert len(boxes[0]) == len(names)
    assert all(box.count_overlaps(boxes[0]) == 1 for box in boxes[0]), "itself alone"
    assert "prefers-color-scheme:dark" in text and "var(--series-5)" in text
    assert not any(colour in text for colour in (plot.INK, plot.GRID, plot.PAPER, *plot.SERIES))
    assert text == plot.svg(figures)


def test_every_set_of_figures_has_its_picture_and_what_others_are_held_against():
    for task, figures in script("methods_page").load().items():
        assert (ROOT / f"docs/images/methods-{task}.svg").exists()
        assert {"lora", "full", "sparse: fisher", "sparse: random"} <= figures["methods"].keys()


def test_the_figures_of_parity_are_within_the_tolerance():
    if not BENCHMARKS.exists():
        pytest.skip("the benchmarks are not part of this distribution")
    figures = json.loads((BENCHMARKS / "results/parity.json").read_bytes())
    rows = [*figures["layers"], *figures["prompts"], *figures["tokens"]]
    errors = [row[key] for row in rows if "outputs" in row for key in _ERRORS]
    assert len(errors) > 200 and max(errors) <= 1e-5


def test_lines_of_code_are_neither_blank_nor_words():
    text = (
        '"""Head\nof two lines."""\n\nimport os  # why\n\n# a comment\ndef f(\n    x,  # it\n'
        '):\n    """Does."""\n    return """two\nlines"""\n'
    )
    assert script("peft_parity").code_lines(text) == {4, 7, 8, 9, 11, 12}
