"""Reading flags that are made from settings."""

from pathlib import Path

import pytest

from lorica.cli.options import read_flags
from lorica.config import known_settings
from lorica.errors import ConfigError
from lorica.methods import METHODS

KNOWN = known_settings(METHODS)


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--r", "8"], {"r": "8"}),
        (["--r=8", "learning_rate=1e-4"], {"r": "8", "learning_rate": "1e-4"}),
        (["--learning-rate", "-1"], {"learning_rate": "-1"}),
        (["--keep-best", "--seed", "1"], {"keep_best": "true", "seed": "1"}),
        (["--no-keep-best"], {"keep_best": "false"}),
        (["--keep-best", "false"], {"keep_best": "false"}),
        (["--packing", "auto"], {"packing": "auto"}),
        (["--no-packing"], {"packing": "false"}),
        (["--load-best-model-at-end"], {"load_best_model_at_end": "true"}),
        (["--target-modules", "q_proj,v_proj"], {"target_modules": "q_proj,v_proj"}),
        (["--data", "-"], {"data": "-"}),
        (["--system=--- be kind = always"], {"system": "--- be kind = always"}),
        (["--system", "-hello"], {"system": "-hello"}),
        (["--unheard", "x"], {"unheard": "x"}),  # resolve says what was meant
    ],
)
def test_ways_to_write_a_flag(words, flags):
    assert read_flags(words, KNOWN).flags == flags


def test_a_settings_file_may_stand_anywhere():
    found = read_flags(["--keep-best", "run.yaml", "--r", "2"], KNOWN)
    assert found.files == [Path("run.yaml")]
    assert found.flags == {"keep_best": "true", "r": "2"}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--r"], "--r needs a value"),
        (["--r", "--seed", "1"], "--r needs a value"),
        (["--r", "1", "--r", "2"], "--r is given twice"),
        (["-r", "1"], "did you mean --r?"),
        (["--jsno"], "did you mean --json?"),
        (["--resum", "x"], "did you mean --resume?"),
        (["a.yaml", "b.yaml"], "several settings files"),
        (["word"], "neither a flag nor a settings file"),
    ],
)
def test_what_cannot_be_read(words, problem):
    with pytest.raises(ConfigError) as caught:
        read_flags(words, KNOWN, ["--json", "--resume"])
    assert problem in str(caught.value)


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        read_flags(["-r", "1", "word", "--seed"], KNOWN)
    assert len(caught.value.problems) == 3
