"""The flags of the command line are a promise: none disappears, and none appears, by accident.

After a change that is meant: LORICA_WRITE_FLAGS=1 pytest tests/house/test_cli_flags.py
"""

import json
import os
from pathlib import Path

import pytest

from house.command_line import commands
from lorica.cli.pages import METHOD_FLAGS, settings_by_group
from lorica.config import known_settings
from lorica.methods import METHODS

FROZEN = Path(__file__).with_name("cli_flags.txt")


@pytest.fixture(scope="module")
def current() -> list[str]:
    return [
        f"lorica {name} {flag}".replace("  ", " ")
        for name, flags in sorted(commands().items())
        for flag in sorted(flags)
    ]


def test_flags_are_the_frozen_ones(current):
    if os.environ.get("LORICA_WRITE_FLAGS"):
        FROZEN.write_text("\n".join(current) + "\n", encoding="utf-8")
    frozen = FROZEN.read_text(encoding="utf-8").split("\n") if FROZEN.exists() else []
    gone = sorted({*frozen} - {*current} - {""})
    new = sorted({*current} - {*frozen})
    assert not gone and not new, f"gone: {gone}\nnew: {new}\n{__doc__}"


def test_help_pages_know_the_settings_of_all_methods():
    """They are read from a file, which is written from the methods: these load torch."""
    of_methods = {k: s for k, s in known_settings(METHODS).items() if k not in known_settings()}
    wanted = json.dumps(settings_by_group(of_methods), indent=1) + "\n"
    if os.environ.get("LORICA_WRITE_FLAGS"):
        METHOD_FLAGS.write_text(wanted, encoding="utf-8")
    assert METHOD_FLAGS.read_text(encoding="utf-8") == wanted, __doc__


def test_the_commands_of_the_design_are_there(current):
    for command in ("demo", "train", "inspect", "eval", "chat", "merge", "report"):
        assert f"lorica {command} --help" in current
    for flag in ("--model", "--data", "--r", "--learning-rate", "--max-steps", "--output-dir"):
        assert f"lorica train {flag}" in current


def test_long_flags_are_words_with_dashes(current):
    for line in current:
        flag = line.split()[-1]
        assert flag.startswith("--") is (len(flag) > 2), line
        assert "_" not in flag and flag == flag.lower(), line
