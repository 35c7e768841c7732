"""Faults of rows that can be seen without a model: what repeats, contradicts or leaks.

This takes about ten microseconds a row, so training does it every time; `screen_thoroughly`, which
is for `lorica check`, has a file of its own, because what it imports takes a second.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from lorica.data.dataset import Dataset
from lorica.data.duplicates import keys_of, repeats, shared_inputs
from lorica.data.findings import SHOWN, Finding, beside, excerpt, places, share
from lorica.data.labels import are_scores, balance, contradictions
from lorica.data.problems import counted
from lorica.data.texts import input_of, normalised, output_of, whole_text

FEW_RECORDS, FEW_OF_LABEL, UNBALANCED = 20, 5, 20
_STOCK_SHARE, _STOCK_LENGTH = 0.1, 12


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


def _repeated(train: Dataset) -> Iterator[Finding]:
    again = repeats(keys_of(train.rows))
    if again:
        said = beside("as", again, train, lambda row: whole_text(train[row]))
        yield Finding(
            "repeated-rows",
            "warn",
            f"{share(len(again), len(train))} rows repeat an earlier one: they count twice",
            len(again),
            places(train, list(again), said),
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
    said = beside("as training record", shared, train)
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
        places(part, list(shared), said),
        "lorica clean --eval-data takes them out of the training data",
    )
