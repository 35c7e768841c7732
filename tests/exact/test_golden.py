"""A run of the embedded base gives the numbers of golden.json; see golden.py."""

import json

from exact.golden import FILE, curve, largest_error
from exact.measured import TOLERANCES


def test_the_loss_curve_is_the_golden_one(tmp_path):
    found, wanted = curve(tmp_path / "run"), json.loads(FILE.read_text(encoding="utf-8"))
    assert len(wanted["loss"]) == 20
    assert len(wanted["eval_loss"]) == 2
    assert wanted["loss"][-1] < 0.8 * wanted["loss"][0]
    assert largest_error(found, wanted) <= TOLERANCES["golden"], (
        "what a run computes has changed; where that is meant, write golden.json anew (golden.py)"
    )
