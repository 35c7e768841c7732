"""Inputs that once broke a reader of strangers' bytes are read, or refused, as they should be."""

from pathlib import Path

import pytest

from bad_input.fuzz_targets import TARGETS, outcome

CORPUS = Path(__file__).parents[1] / "corpus"
FILES = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name} {path.name}")
def test_it_breaks_nothing(path, tmp_path):
    assert outcome(path.parent.name, path.read_bytes(), tmp_path / "x")


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_are_read(target, tmp_path):
    seeds = TARGETS[target].seeds()
    read = [outcome(target, seed, tmp_path / "x") == "read" for seed in seeds]
    assert sum(read) > 0.7 * len(seeds)


def test_the_corpus_is_there():
    assert FILES and {path.parent.name for path in FILES} <= set(TARGETS)
