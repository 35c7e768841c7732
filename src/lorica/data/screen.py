"""Faults of rows that can be seen without a model: what repeats, contradicts, leaks or is broken.

`screen_quickly` takes about ten microseconds a row, so training does it every time;
`screen_thoroughly` is for `lorica check`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from lorica.data.dataset import Dataset
from lorica.data.duplicates import NearIndex, keys_of, near_parts, repeats, shared_inputs
from lorica.data.findings import SHOWN, Finding, excerpt, places, share
from lorica.data.labels import are_scores, balance, contradictions, suspects
from lorica.data.languages import languages_of
from lorica.data.problems import around, counted
from lorica.data.secrets import KINDS, find, hint_of
from lorica.data.texts import input_of, normalised, output_of, texts_of, whole_text

FEW_RECORDS, FEW_OF_LABEL, UNBALANCED = 20, 5, 20
_STOCK_SHARE, _STOCK_LENGTH = 0.1, 12
# UTF-8 that was read as Latin-1 or Windows-1252, and the sign for a byte that was no text at all
_BROKEN = re.compile(
    "\ufffd|\u00e2\u20ac[\u0080-\u00bf\u0153\u2122\u02dc\u201c\u00a6\u201d]|\u00c3[\u0080-\u00bf]|\u00ef\u00bb\u00bf"
)


def screen_quickly(train: Dataset, held_out: Sequence[Dataset] = ()) -> list[Finding]:
    """What repeats, leaks, contradicts, or leaves nothing to tell apart.

    Args:
        train: the training records.
        held_out: what the model is judged on; empty sets count as none.
    """
    found: list[Finding] = []
    if len(train) < FEW_RECORDS:
        text = f"{counted(len(train), 'training record')}: a model learns these by heart"
        found.append(Finding("few-records", "warn", text, len(train)))
    found += _repeated(train)
    found += _stock_answers(train)
    if train.format == "classification":
        found += _label_findings(train, held_out)
    for part in held_out:
        if len(part):
            found += _leaks(train, part)
    return found


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


def _repeated(train: Dataset) -> Iterator[Finding]:
    again = repeats(keys_of(train.rows))
    if again:
        rows = list(again)
        said = [
            f"as {train.origins[again[r]][1]}: {excerpt(whole_text(train[r]))}"
            for r in rows[:SHOWN]
        ]
        yield Finding(
            "repeated-rows",
            "warn",
            f"{share(len(again), len(train))} rows repeat an earlier one: they count twice",
            len(again),
            places(train, rows, said),
            "lorica clean leaves the first of each",
        )


def _stock_answers(train: Dataset) -> Iterator[Finding]:
    """One long answer to many questions: often a refusal or an error message of a generator."""
    outputs = [output_of(row) for row in train.rows]
    if len(train) < FEW_RECORDS or outputs[0] is None:
        return
    counts = Counter(normalised(output or "") for output in outputs)
    answer, number = counts.most_common(1)[0]
    if number >= _STOCK_SHARE * len(train) and len(answer) >= _STOCK_LENGTH:
        rows = [i for i, output in enumerate(outputs) if normalised(output or "") == answer]
        yield Finding(
            "stock-answer",
            "warn",
            f"{share(number, len(train))} rows have the same answer, {excerpt(answer)}: the model "
            "will give it to anything",
            number,
            places(train, rows),
            "keep a few of them",
        )


def _label_findings(train: Dataset, held_out: Sequence[Dataset]) -> Iterator[Finding]:
    counts = balance(train.rows)
    if len(counts) == 1:
        yield Finding(
            "one-label",
            "refuse",
            f"every training record has the label {next(iter(counts))!r}: there is nothing to tell "
            "apart",
            len(train),
            mend="add records of the other labels, or see whether the right column is the label",
        )
        return
    if len(counts) == len(train):
        yield Finding(
            "label-per-record",
            "refuse",
            f"all {len(train):,} training records have labels of their own: this is no class",
            len(train),
            mend="see whether the right column is the label",
        )
        return
    if are_scores(counts):
        text = f"the {len(counts):,} labels are numbers on a scale, not classes: {_named(counts)}"
        mend = "make classes of them; learning numbers is no task here"
        yield Finding("scores-as-labels", "warn", text, len(train), mend=mend)
        return
    rare = {label: n for label, n in counts.items() if n < FEW_OF_LABEL}
    if rare:
        fewer = f"with fewer than {FEW_OF_LABEL} records"
        text = f"{counted(len(rare), 'label')} {fewer}: {_named(rare)}"
        yield Finding("rare-label", "warn", text, sum(rare.values()), mend="add records of them")
    most, least = max(counts.values()), min(counts.values())
    if most >= UNBALANCED * least:
        first, last = next(iter(counts)), list(counts)[-1]
        yield Finding(
            "unbalanced-labels",
            "warn",
            f"{first!r} has {most:,} records and {last!r} {least:,}: accuracy will look better "
            "than the model is",
            mend="judge by macro_f1",
        )
    for part in held_out:
        if new := sorted(set(balance(part.rows)) - set(counts)):
            rows = [i for i, row in enumerate(part.rows) if str(row["label"]) in new]
            yield Finding(
                "unseen-label",
                "warn",
                f"labels that no training record has: {', '.join(map(repr, new[:10]))}",
                len(rows),
                places(part, rows),
                "the model can never be right about these records",
            )
    if groups := contradictions(train.rows):
        firsts = [group[0] for group in groups]
        said = [
            f"and line {train.origins[group[1]][1]}: {excerpt(input_of(train[group[0]]))}"
            for group in groups[:SHOWN]
        ]
        yield Finding(
            "contradicting-labels",
            "warn",
            f"{counted(len(groups), 'input')} with different labels",
            sum(map(len, groups)),
            places(train, firsts, said),
            "decide for one label",
        )


def _named(counts: dict[str, int]) -> str:
    return ", ".join(f"{label!r} {n}x" for label, n in list(counts.items())[:10])


def _leaks(train: Dataset, part: Dataset) -> Iterator[Finding]:
    shared = shared_inputs(train.rows, part.rows)
    if not shared:
        return
    rows = list(shared)
    said = [f"as training record {train.origins[shared[r]][1]}" for r in rows[:SHOWN]]
    everything = len(shared) == len(part)
    yield Finding(
        "leak",
        "refuse" if everything else "warn",
        f"{share(len(shared), len(part))} inputs of the evaluation are in the training data: "
        + (
            "its scores would only say what was learned by heart"
            if everything
            else "the scores will be too good"
        ),
        len(shared),
        places(part, rows, said),
        "lorica clean --eval-data takes them out of the training data",
    )


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
        rows = list(pairs)
        said = [
            f"nearly as {train.origins[pairs[r]][1]}: {excerpt(whole_text(train[r]))}"
            for r in rows[:SHOWN]
        ]
        yield Finding(
            "near-duplicates",
            "warn" if len(pairs) >= 0.02 * len(train) else "info",
            f"{share(len(pairs), len(train))} rows are nearly the same as an earlier one",
            len(pairs),
            places(train, rows, said),
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
        rows = list(pairs)
        said = [
            f"nearly as training record {train.origins[pairs[r]][1]}: {excerpt(input_of(part[r]))}"
            for r in rows[:SHOWN]
        ]
        yield Finding(
            "near-leak",
            "warn",
            f"{share(len(pairs), len(part))} inputs of the evaluation are nearly in the training "
            "data",
            len(pairs),
            places(part, rows, said),
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
