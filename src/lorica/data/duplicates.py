"""Rows that say the same, letter by letter or nearly: within a set, and between two sets.

Exactly the same is the same after `texts.normalised`. Nearly the same is a Jaccard similarity of at
least `THRESHOLD` between the sets of 5-character shingles; candidates come from MinHash with
locality-sensitive hashing (Broder 1997; datasketch), and each is then checked on the sets
themselves, so that the hashing can miss a pair but never invent one.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from lorica.data.shapes import Row
from lorica.data.texts import input_of, normalised, output_of, whole_text
from lorica.errors import MissingPackage

THRESHOLD = 0.7
"""One edit in a sentence of 50 characters leaves a similarity of about 0.8."""
_SHINGLE, _PERMUTATIONS = 5, 128
_COMPARED = 4_000
"""Characters at the beginning of a text that are compared."""
_BATCH = 10_000
_CANDIDATES = 64


def keys_of(rows: Sequence[Row]) -> list[str]:
    """What makes rows the same: all their texts and the label, normalised."""
    return [f"{normalised(whole_text(row))}\n{row.get('label', '')}" for row in rows]


def repeats(keys: Sequence[str]) -> dict[int, int]:
    """Index of a later row -> index of the first with the same key."""
    first: dict[str, int] = {}
    return {i: first[key] for i, key in enumerate(keys) if first.setdefault(key, i) != i}


def shared_inputs(rows: Sequence[Row], others: Sequence[Row]) -> dict[int, int]:
    """Index in `others` -> index in `rows` of a row with the same input."""
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(normalised(input_of(row)), index)
    keys = (normalised(input_of(row)) for row in others)
    return {i: first[key] for i, key in enumerate(keys) if key in first}


class NearIndex:
    """Texts that can be asked for one that is nearly the same.

    Raises:
        MissingPackage: datasketch is not there.
    """

    def __init__(self) -> None:
        try:
            import datasketch
        except ImportError as error:
            raise MissingPackage.of("datasketch", "clean", "finding near duplicates") from error
        self._minhash: Any = datasketch.MinHash
        self._index = datasketch.MinHashLSH(threshold=THRESHOLD, num_perm=_PERMUTATIONS)
        self._shingles: list[list[set[int]]] = []

    def near(self, rows: Sequence[Sequence[str]], *, add: bool = True) -> Iterator[int | None]:
        """For every row the number of an earlier one that is nearly the same, or None.

        Args:
            rows: the texts of each, normalised, as many for every row: all of them have to be
                similar. Rows are numbered in the order in which they were added.
            add: whether these rows can be found by later ones.
        """
        for start in range(0, len(rows), _BATCH):
            parts = [[_shingles(text) for text in row] for row in rows[start : start + _BATCH]]
            for own, signature in zip(parts, self._signatures(parts), strict=True):
                yield self._nearest(own, signature)
                if add:
                    self._index.insert(len(self._shingles), signature, check_duplication=False)
                    self._shingles.append(own)

    def _signatures(self, rows: list[list[set[int]]]) -> list[Any]:
        every = [set().union(*parts) for parts in rows]
        return self._minhash.bulk(every, num_perm=_PERMUTATIONS, hashfunc=lambda number: number)

    def _nearest(self, own: list[set[int]], signature: Any) -> int | None:
        best, found = 0.0, None
        candidates: list[Any] = self._index.query(signature)
        for candidate in sorted(candidates)[:_CANDIDATES]:
            similarity = min(map(_jaccard, own, self._shingles[candidate]))
            if similarity >= THRESHOLD and similarity > best:
                best, found = similarity, candidate
        return found


def near_parts(row: Row) -> tuple[str, ...]:
    """The texts of a row that must all be similar: its input, and its output where it has one."""
    output = output_of(row)
    own = (input_of(row),) if output is None else (input_of(row), output)
    return tuple(normalised(text) for text in own)


def _jaccard(own: set[int], other: set[int]) -> float:
    common = len(own & other)
    return common / (len(own) + len(other) - common)


def _shingles(text: str) -> set[int]:
    raw = text[:_COMPARED].encode("utf-8", "surrogatepass")
    last = max(1, len(raw) - _SHINGLE + 1)
    return {zlib.crc32(raw[start : start + _SHINGLE]) for start in range(last)}
