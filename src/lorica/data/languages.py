"""Which languages the texts of a set are in, by py3langid, on a draw of them."""

from collections import Counter
from collections.abc import Sequence

from lorica.data.pack import order
from lorica.errors import MissingPackage

DRAWN = 2_000
LETTERS = 20
"""Texts with fewer letters say too little of their language."""


def languages_of(texts: Sequence[str], *, seed: int = 0) -> dict[str, int]:
    """ISO 639-1 code -> number of texts, most frequent first; "?" where a text is too short.

    At most `DRAWN` texts are looked at, drawn with `seed`.

    Raises:
        MissingPackage: py3langid is not there.
    """
    try:
        import py3langid
    except ImportError as error:
        raise MissingPackage.of("py3langid", "clean", "telling languages") from error
    chosen = order(len(texts), seed=seed)[:DRAWN]
    counts: Counter[str] = Counter()
    for index in chosen:
        text = texts[int(index)][:2_000]
        enough = sum(c.isalpha() for c in text) >= LETTERS
        counts[str(py3langid.classify(text)[0]) if enough else "?"] += 1
    return dict(counts.most_common())
