"""The demonstration's data set: the same for ever, and nothing leaks from split to split."""

import pytest

from lorica.data.facts import SPLITS, TEMPLATES, facts
from lorica.errors import DataError


def test_rows_follow_the_shape_and_every_reference_says_every_slot():
    rows = facts("train", num_records=501, seed=3)
    assert len(rows) == 501
    for row in rows:
        assert set(row) == {"prompt", "completion", "slots", "references"}
        assert row["prompt"].endswith("\n")
        assert row["prompt"].count(" | ") == len(row["slots"]) - 1
        assert row["completion"] == row["references"][0]
        assert len(set(row["references"])) == len(row["references"]) == 3
        for text in (row["prompt"], *row["references"]):
            assert all(slot in text for slot in row["slots"])
        for sentence in row["references"]:
            assert sentence[0].isupper() and sentence.endswith(".") and "{" not in sentence


def test_records_are_different_and_follow_from_the_seed():
    rows = facts("valid", num_records=133, seed=7)
    assert len({row["prompt"] for row in rows}) == 133
    assert rows == facts("valid", num_records=133, seed=7)
    assert rows[:17] == facts("valid", num_records=17, seed=7)
    assert rows != facts("valid", num_records=133, seed=8)
    assert facts("test", num_records=0) == []


def test_the_first_record_never_changes():
    """Scores of different releases are only comparable on the same records."""
    (row,) = facts("test", num_records=1)
    assert row["prompt"] == (
        "name: The White Button | kind: tidy teahouse | place: Abbey Street"
        " | keeper: Phoebe Slater\n"
    )


@pytest.mark.parametrize("held_out", ["valid", "test"])
def test_no_held_out_value_stands_anywhere_in_training(held_out):
    training = "\n".join(
        text
        for row in facts("train", num_records=5000)
        for text in (row["prompt"], *row["references"])
    )
    values = {slot for row in facts(held_out, num_records=2000) for slot in row["slots"]}
    assert len(values) > 500
    assert [value for value in values if value in training] == []


def test_the_splits_share_no_value():
    values = {
        split: {slot for row in facts(split, num_records=3000) for slot in row["slots"]}
        for split in SPLITS
    }
    assert not values["train"] & values["valid"]
    assert not values["train"] & values["test"]
    assert not values["valid"] & values["test"]


def test_every_template_is_used_and_articles_fit():
    rows = facts("train", num_records=2000)
    fields = {tuple(part.split(": ")[0] for part in row["prompt"].split(" | ")) for row in rows}
    assert fields == set(TEMPLATES)
    text = "\n".join(row["completion"] for row in rows)
    assert " an ancient " in text and " a quiet " in text
    assert " a ancient " not in text and " an quiet " not in text


def test_an_unknown_split_names_the_nearest():
    with pytest.raises(DataError, match=r"no split 'tset'") as error:
        facts("tset", num_records=3)
    assert "did you mean 'test'?" in str(error.value)


def test_a_negative_count_is_refused():
    with pytest.raises(DataError, match="num_records is -1"):
        facts("train", num_records=-1)
