"""A run of 40 steps, stopped at a step and gone on with, writes the adapter it would have written.

Every fourth step here; `benchmarks/exactness.py` takes all 40.
"""

import pytest
import torch

from exact.measured import INTERRUPTED_STEPS, interrupted_run, short_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return short_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("step", range(1, INTERRUPTED_STEPS + 1, 4))
def test_stopped_and_gone_on_with(whole, tmp_path, step):
    assert interrupted_run(tmp_path / "run", step) == whole


def test_in_bfloat16(tmp_path):
    base = {"dtype": torch.bfloat16}
    wanted = short_run(tmp_path / "whole", **base)
    assert interrupted_run(tmp_path / "run", 23, **base) == wanted
