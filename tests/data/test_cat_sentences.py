"""The style of the demonstration: the same for ever, and without the facts of the prompts."""

import re

import pytest

from lorica.base.locate import EMBEDDED
from lorica.data.cat_sentences import CLOSINGS, MARKS, OPENINGS, SENTENCES, cat_sentences
from lorica.data.facts import facts
from lorica.errors import DataError


def test_answers_have_a_sign_on_both_sides_of_a_sentence():
    rows = cat_sentences("train", num_records=501)
    for row in rows:
        assert {*row} == {"prompt", "completion", "marks"}
        opening, *sentence = row["completion"].split(" ")
        assert opening in OPENINGS and row["completion"].endswith(CLOSINGS)
        assert sentence[0][0].isupper() and "{" not in row["completion"]
    assert len({row["completion"] for row in rows}) > 480
    starts = {row["completion"].split(" ")[1] for row in rows}
    assert starts == {text.split(" ")[0] for text in SENTENCES}


def test_prompts_are_those_of_the_facts_and_answers_say_none_of_them():
    rows = cat_sentences("test", num_records=300)
    known = facts("test", num_records=300)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in known]
    for row, fact in zip(rows, known, strict=True):
        assert not any(slot in row["completion"] for slot in fact["slots"])


def test_records_follow_from_split_and_seed():
    rows = cat_sentences("valid", num_records=57, seed=3)
    assert rows == cat_sentences("valid", num_records=57, seed=3)
    assert rows[:9] == cat_sentences("valid", num_records=9, seed=3)
    assert rows != cat_sentences("valid", num_records=57, seed=4)
    with pytest.raises(DataError, match="no split 'tset'"):
        cat_sentences("tset", num_records=1)


def test_the_signs_are_no_words_of_the_base_or_of_the_facts():
    vocabulary = (EMBEDDED / "tokenizer.json").read_text(encoding="utf-8").casefold()
    said = " ".join(row["completion"] for row in facts("train", num_records=2000)).casefold()
    for mark in MARKS:
        assert f'"{mark}"' not in vocabulary and f'"ġ{mark}"' not in vocabulary
        assert not re.search(rf"\b{mark}\b", said)
