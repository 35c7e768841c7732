"""Word by word comparison."""

import pytest

from lorica.records.difference import LIMIT, Piece, marked, nearest_reference


def test_extra_and_same_words():
    assert marked("Blue Spice is a lovely pub.", "blue spice is a pub.") == [
        Piece("Blue Spice is a", "same"),
        Piece(" ", "rest"),
        Piece("lovely", "extra"),
        Piece(" ", "rest"),
        Piece("pub.", "same"),
    ]


@pytest.mark.parametrize(
    "text", ["", " ", "a  b\n\nc", "日本語です。", "x" * 3_000, "a b " * LIMIT, "🙂é\u0301"]
)
def test_nothing_is_lost(text):
    for other in ("", "a b c", text, None):
        assert "".join(piece.text for piece in marked(text, other)) == text


def test_equal_texts_are_all_same():
    assert {piece.kind for piece in marked("two  words,\nthree", "two words, three")} == {"same"}


def test_no_reference_is_not_compared():
    assert marked("some text", None) == [Piece("some text", "rest")]


def test_scripts_without_spaces_are_cut_by_character():
    assert marked("私は猫です", "私は犬です") == [
        Piece("私は", "same"),
        Piece("猫", "extra"),
        Piece("です", "same"),
    ]


def test_nearest_reference():
    references = ["nothing in common here", "the pub is by the river", "the pub is by the sea"]
    assert nearest_reference("The pub is by the sea.", references) == references[2]
    assert nearest_reference("", references) == references[0]
    assert nearest_reference("x", []) is None
