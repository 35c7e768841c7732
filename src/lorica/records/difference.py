"""Which words of an output are in a reference, in order."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

# a word, a run of space, or one sign; scripts without spaces (kana, Han, Thai) are split by
# character
_PIECES = re.compile(
    r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]|[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]+|\s+|[^\w\s]"
)
LIMIT = 600  # pieces compared; beyond, the quadratic time would be felt


@dataclass(frozen=True)
class Piece:
    """A part of a text: in both texts ("same"), in this one only ("extra"), or not compared
    ("rest").
    """

    text: str
    kind: Literal["same", "extra", "rest"]


def nearest_reference(text: str, references: Sequence[str]) -> str | None:
    """The reference with the largest share of common words, the first of equals; None without
    references.
    """
    words = _words(text)

    def likeness(reference: str) -> float:
        return SequenceMatcher(None, words, _words(reference), autojunk=False).ratio()

    return max(references, key=likeness, default=None)


def marked(text: str, other: str | None) -> list[Piece]:
    """`text` cut into pieces by whether `other` has them, compared word by word without regard to
    case.
    """
    pieces = _PIECES.findall(text)
    if other is None:
        return [Piece(text, "rest")] if text else []
    head, tail = pieces[:LIMIT], "".join(pieces[LIMIT:])
    indices = [index for index, piece in enumerate(head) if not piece.isspace()]
    words = [head[index].casefold() for index in indices]
    same: set[int] = set()
    for block in SequenceMatcher(None, words, _words(other), autojunk=False).get_matching_blocks():
        same.update(indices[block.a : block.a + block.size])
    found = [
        Piece(piece, "same") if index in same else Piece(piece, "extra")
        for index, piece in enumerate(head)
    ]
    return _joined(_bridged(found)) + ([Piece(tail, "rest")] if tail else [])


def _words(text: str) -> list[str]:
    return [piece.casefold() for piece in _PIECES.findall(text)[:LIMIT] if not piece.isspace()]


def _bridged(pieces: list[Piece]) -> list[Piece]:
    """Space takes the kind of its neighbours where they agree, and none otherwise."""
    result = []
    for index, piece in enumerate(pieces):
        if piece.text.isspace():
            near = pieces[max(0, index - 1) : index] + pieces[index + 1 : index + 2]
            agree = len({one.kind for one in near}) == 1
            piece = Piece(piece.text, near[0].kind if agree else "rest")
        result.append(piece)
    return result


def _joined(pieces: list[Piece]) -> list[Piece]:
    result: list[Piece] = []
    for piece in pieces:
        if result and result[-1].kind == piece.kind:
            result[-1] = Piece(result[-1].text + piece.text, piece.kind)
        else:
            result.append(piece)
    return result
