"""Looks at records for what takes seconds to minutes to see; see `screen` for what is quick."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from lorica.data.dataset import Dataset
from lorica.data.duplicates import NearIndex, keys_of, near_parts, repeats
from lorica.data.findings import SHOWN, Finding, beside, excerpt, places, share
from lorica.data.languages import languages_of
from lorica.data.problems import around, counted
from lorica.data.secrets import KINDS, find, hint_of
from lorica.data.suspects import suspects
from lorica.data.texts import input_of, normalised, texts_of, whole_text

# UTF-8 that was read as Latin-1 or Windows-1252, and the sign for a byte that was no text at all
_BROKEN = re.compile(
    "\ufffd|\u00e2\u20ac[\u0080-\u00bf\u0153\u2122\u02dc\u201c\u00a6\u201d]|\u00c3[\u0080-\u00bf]|\u00ef\u00bb\u00bf"
)


def screen_thoroughly(
    train: Dataset, held_out: Sequence[Dataset] = (), *, near: bool = True, language: bool = True
) -> list[Finding]:
    """Near duplicates, secrets, broken text, languages, labels that look wrong: seconds to minutes.

    Raises:
        MissingPackage: `near` without datasketch, `language` without py3langid.
    """
    found = [*_broken(train), *_secrets(train)]
    if near:
        found += _near(train, held_out)
    if language:
        found += _languages(train)
    if train.format == "classification":
        found += _suspected(train)
    return found


def _broken(train: Dataset) -> Iterator[Finding]:
    rows, said = [], []
    for index, row in enumerate(train.rows):
        match = next((m for _, text in texts_of(row) if (m := _BROKEN.search(text))), None)
        if match:
            rows.append(index)
            shown = around(match.string[: match.end() + 15], match.start(), 15)
            said.append(excerpt(shown))
    if rows:
        yield Finding(
            "broken-text",
            "warn",
            f"{share(len(rows), len(train))} rows have text that was read in the wrong encoding",
            len(rows),
            places(train, rows, said),
            "write the file anew from its source as UTF-8; ftfy can mend most of it",
        )


def _secrets(train: Dataset) -> Iterator[Finding]:
    rows: dict[str, list[int]] = defaultdict(list)
    said: dict[str, list[str]] = defaultdict(list)
    for index, row in enumerate(train.rows):
        for where, text in texts_of(row):
            for found in find(text):
                rows[found.kind].append(index)
                said[found.kind].append(f"{where}: {hint_of(text, found)}")
    for kind, indices in rows.items():
        number = len(set(indices))
        yield Finding(
            f"secret-{kind}" if KINDS[kind].secret else f"personal-{kind}",
            "warn",
            f"{KINDS[kind].words}: {counted(len(indices), 'time')} in "
            f"{share(number, len(train))} rows; a model can say them again",
            number,
            places(train, indices, said[kind]),
            "lorica clean --redact replaces them",
        )


def _near(train: Dataset, held_out: Sequence[Dataset]) -> Iterator[Finding]:
    again = repeats(keys_of(train.rows))
    kept = [i for i in range(len(train)) if i not in again]
    twins = NearIndex().near([near_parts(train.rows[i]) for i in kept])
    pairs = {i: kept[twin] for i, twin in zip(kept, twins, strict=True) if twin is not None}
    if pairs:
        said = beside("nearly as", pairs, train, lambda row: whole_text(train[row]))
        yield Finding(
            "near-duplicates",
            "warn" if len(pairs) >= 0.02 * len(train) else "info",
            f"{share(len(pairs), len(train))} rows are nearly the same as an earlier one",
            len(pairs),
            places(train, list(pairs), said),
            "lorica clean --near leaves the first of each",
        )
    for part in held_out:
        yield from _near_leaks(train, part)


def _near_leaks(train: Dataset, part: Dataset) -> Iterator[Finding]:
    first: dict[str, int] = {}  # input -> its first record: many inputs have several outputs
    for row, record in enumerate(train.rows):
        first.setdefault(normalised(input_of(record)), row)
    index = NearIndex()
    for _ in index.near([(text,) for text in first]):
        pass
    rows = list(first.values())
    inputs = [normalised(input_of(row)) for row in part.rows]
    asked = [text for text in dict.fromkeys(inputs) if text not in first]
    twins = dict(zip(asked, index.near([(text,) for text in asked], add=False), strict=True))
    pairs = {i: rows[t] for i, text in enumerate(inputs) if (t := twins.get(text)) is not None}
    if pairs:
        words = "nearly as training record"
        said = beside(words, pairs, train, lambda row: input_of(part[row]))
        yield Finding(
            "near-leak",
            "warn",
            f"{share(len(pairs), len(part))} inputs of the evaluation are nearly in the training "
            "data",
            len(pairs),
            places(part, list(pairs), said),
            "lorica clean --eval-data --near takes them out of the training data",
        )


def _languages(train: Dataset) -> Iterator[Finding]:
    counts = languages_of([whole_text(row) for row in train.rows])
    known = {language: n for language, n in counts.items() if language != "?"}
    total = sum(known.values())
    if total:
        told = [f"{code} {n / total:.0%}" for code, n in known.items() if n >= 0.02 * total]
        of = f"of {total:,} texts that were looked at and are long enough to tell"
        yield Finding("languages", "info", f"languages: {', '.join(told)} ({of})")


def _suspected(train: Dataset) -> Iterator[Finding]:
    found = suspects(train.rows)
    if found is None or not found.rows:
        return
    rows = [row for row, _ in found.rows]
    said = [
        f"{train[row]['label']!r}, rather {label!r}: {excerpt(input_of(train[row]))}"
        for row, label in found.rows[:SHOWN]
    ]
    yield Finding(
        "suspected-labels",
        "warn" if len(rows) <= 0.2 * found.judged else "info",
        f"{share(len(rows), found.judged)} labels look wrong to a simple classifier (it is right "
        f"about {found.accuracy:.0%}; always saying the most frequent label: {found.majority:.0%})",
        len(rows),
        places(train, rows, said),
        "look at the first ones; a suspicion is no proof",
    )
