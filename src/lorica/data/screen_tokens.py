"""Faults that show once the records are token ids: what is cut, dropped, doubled or never learned.

Everything here reads the very examples that training would see, so what it says is so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lorica.data.dataset import Dataset
from lorica.data.encode import Fault
from lorica.data.examples import Example
from lorica.data.findings import SHOWN, Finding, Severity, excerpt, places, share
from lorica.data.problems import counted
from lorica.data.texts import whole_text

MANY_CUT, MANY_FAULTY, FEW_TRAINED = 0.5, 0.05, 0.01
_TOKENS_PER_CHARACTER = 0.75
_BINS = 24


@dataclass(frozen=True)
class Sight:
    """What the screening looks at.

    Attributes:
        dataset: the records.
        examples: what they became; a record that could not be encoded has none.
        tokenizer: a tokenizer of transformers.
        faults: the records that could not be encoded.
        task: "causal-lm", "text-classification" or "seq2seq".
        max_length: what the examples were cut to; None: nothing.
        num_positions: the longest input of the model; None: no limit known.
        vocabulary: rows of the model's embedding; None: not known.
        notes: what the encoder said.
    """

    dataset: Dataset
    examples: Sequence[Example]
    tokenizer: Any
    faults: Sequence[Fault] = ()
    task: str = "causal-lm"
    max_length: int | None = None
    num_positions: int | None = None
    vocabulary: int | None = None
    notes: Sequence[str] = ()

    @property
    def is_causal(self) -> bool:
        return self.task == "causal-lm"


def lengths_of(examples: Sequence[Example]) -> dict[str, Any]:
    """Percentiles and a histogram of the lengths in tokens: {"percentiles": {"p50": ...},
    "histogram": {"edges": [...], "counts": [...]}}.
    """
    lengths = sorted(len(e) + e.num_cut for e in examples)
    if not lengths:
        return {"percentiles": {}, "histogram": {"edges": [], "counts": []}}
    at = {name: lengths[int((len(lengths) - 1) * q)] for name, q in _PERCENTILES.items()}
    low, high = lengths[0], lengths[-1] + 1
    width = max(1, -(-(high - low) // _BINS))
    edges = list(range(low, high + width, width))
    counts = [0] * (len(edges) - 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    mean = round(sum(lengths) / len(lengths), 1)
    return {"percentiles": {**at, "mean": mean}, "histogram": {"edges": edges, "counts": counts}}


_PERCENTILES = {"min": 0.0, "p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


def screen_tokens(sight: Sight) -> list[Finding]:
    """Everything that can be seen on encoded records, without weights."""
    checks = [_faults, _vocabulary, _cut, _positions, _unknown, _spread, _remarks]
    if sight.is_causal:
        checks += [_begins, _ends, _trained]
    return [finding for check in checks for finding in check(sight)]


def _faults(sight: Sight) -> Iterator[Finding]:
    codes = {"cannot be rendered": "template-fails", "have nothing to learn": "nothing-trained"}
    mends = {
        "cannot be rendered": "mend the records, or give another template with --chat-template",
        "have nothing to learn": "raise --max-length, fill the empty answers, or remove the rows",
    }
    for kind, code in codes.items():
        own = [fault for fault in sight.faults if fault.kind == kind]
        if own:
            text = f"{share(len(own), len(sight.dataset))} records {kind}"
            where = tuple(fault.text for fault in own[:SHOWN])
            yield Finding(code, "refuse", text, len(own), where, mends[kind])


def _vocabulary(sight: Sight) -> Iterator[Finding]:
    largest = max((max(e.input_ids) for e in sight.examples if e.input_ids), default=0)
    if sight.vocabulary is not None and largest >= sight.vocabulary:
        yield Finding(
            "vocabulary",
            "refuse",
            f"the tokenizer gives the token {largest}, but the model has embeddings for "
            f"{sight.vocabulary:,} tokens only",
            mend="use the tokenizer that belongs to this model",
        )


def _cut(sight: Sight) -> Iterator[Finding]:
    cut = [e for e in sight.examples if e.num_cut]
    if not cut:
        return
    lost = sum(e.num_trained_cut for e in cut)
    trained = lost + sum(e.num_trained for e in sight.examples)
    halved = [e for e in cut if e.num_trained_cut > MANY_CUT * (e.num_trained_cut + e.num_trained)]
    many = len(cut) > MANY_FAULTY * len(sight.examples)
    severity: Severity = "warn" if many else "info"
    if sight.is_causal and len(halved) > MANY_CUT * len(sight.examples):
        severity = "refuse"
    text = f"max_length {sight.max_length} cuts {share(len(cut), len(sight.examples))} records"
    if sight.is_causal:
        text += f" and {share(lost, trained)} of the trained tokens"
        text += f"; {len(halved):,} records lose more than half of their answer" if halved else ""
    said = [f"{e.num_cut:,} tokens cut" for e in cut[:SHOWN]]
    yield Finding(
        "cut",
        severity,
        text,
        len(cut),
        places(sight.dataset, [e.row for e in cut], said),
        f"raise --max-length: the longest has {max(len(e) + e.num_cut for e in cut):,} tokens",
    )


def _positions(sight: Sight) -> Iterator[Finding]:
    limit = sight.num_positions
    long = [e for e in sight.examples if limit is not None and len(e) > limit]
    if long and sight.max_length is None:
        deed = (
            "divides them into windows" if sight.dataset.format == "text" else "cuts them to that"
        )
        said = [f"{len(e):,} tokens" for e in long[:SHOWN]]
        yield Finding(
            "beyond-positions",
            "info",
            f"{share(len(long), len(sight.examples))} records have more tokens than the {limit:,} "
            f"positions of the model; training {deed}",
            len(long),
            places(sight.dataset, [e.row for e in long], said),
        )


def _unknown(sight: Sight) -> Iterator[Finding]:
    token = getattr(sight.tokenizer, "unk_token_id", None)
    if token is None or token == sight.tokenizer.pad_token_id == sight.tokenizer.eos_token_id:
        return
    with_it = [e for e in sight.examples if token in e.input_ids]
    if with_it:
        number = sum(e.input_ids.count(token) for e in with_it)
        yield Finding(
            "unknown-tokens",
            "warn" if len(with_it) > MANY_FAULTY * len(sight.examples) else "info",
            f"{counted(number, 'piece')} of text that the tokenizer does not know, in "
            f"{share(len(with_it), len(sight.examples))} records: the model cannot see them",
            len(with_it),
            places(sight.dataset, [e.row for e in with_it]),
            "another base, or text without these signs",
        )


def _spread(sight: Sight) -> Iterator[Finding]:
    """A tokenizer that was not made for these texts cuts them into single signs."""
    drawn = sight.examples[:: max(1, len(sight.examples) // 1_000)]
    characters = sum(len(whole_text(sight.dataset[e.row])) for e in drawn if not e.num_cut)
    tokens = sum(len(e) for e in drawn if not e.num_cut)
    if characters and tokens > _TOKENS_PER_CHARACTER * characters:
        yield Finding(
            "wrong-tokenizer",
            "warn",
            f"{tokens / characters:.2f} tokens per character: the tokenizer was not made for such "
            "texts, so they are long, slow and hard to learn",
            mend="a base that was trained on this language",
        )


def _remarks(sight: Sight) -> Iterator[Finding]:
    for note in sight.notes:
        if note.startswith("the template left out"):
            yield Finding(
                "template-drops",
                "warn",
                note,
                mend="--chat-template FILE with a template that keeps it",
            )
        elif note.startswith("special tokens spelled"):
            yield Finding("spelled-tokens", "info", note)
        elif "no chat template" in note:
            yield Finding("no-chat-template", "info", note)


def _begins(sight: Sight) -> Iterator[Finding]:
    bos = sight.tokenizer.bos_token_id
    if bos is None or bos == sight.tokenizer.eos_token_id:
        return
    doubled = [e for e in sight.examples if e.input_ids[:2] == [bos, bos]]
    without = [e for e in sight.examples if e.input_ids[:1] != [bos]]
    if doubled:
        text = f"{share(len(doubled), len(sight.examples))} records begin with two BOS tokens"
        mend = "take BOS out of the template or out of the texts"
        where = places(sight.dataset, [e.row for e in doubled])
        yield Finding("two-bos", "warn", text, len(doubled), where, mend)
    if without and len(without) < len(sight.examples):
        text = (
            f"{share(len(without), len(sight.examples))} records have no BOS, the others have one"
        )
        where = places(sight.dataset, [e.row for e in without])
        yield Finding("some-bos", "warn", text, len(without), where, "give the records one form")
    elif without:
        text = (
            f"no record begins with {sight.tokenizer.bos_token!r}, which the tokenizer has but "
            "does not write by itself"
        )
        mend = "where the base was pretrained with it: --add-bos true"
        yield Finding("no-bos", "info", text, len(without), mend=mend)


def _ends(sight: Sight) -> Iterator[Finding]:
    """What is learned has to end with a token that ends: EOS, or the template's end of turn."""
    last_window = {e.row: e for e in sight.examples}.values()  # of a text in several windows
    whole = [e for e in last_window if not e.num_cut]
    control = set(getattr(sight.tokenizer, "all_special_ids", ()))
    endless = [e for e in whole if e.labels[-1] not in control]
    if endless:
        said = [
            f"ends with {excerpt(sight.tokenizer.decode(e.input_ids[-12:]))}" for e in endless[:5]
        ]
        yield Finding(
            "no-end",
            "refuse" if len(endless) > MANY_FAULTY * len(whole) else "warn",
            f"{share(len(endless), len(whole))} records do not end with a trained end token: the "
            "model would not learn to stop",
            len(endless),
            places(sight.dataset, [e.row for e in endless], said),
            "a template that ends the turn of the assistant, or a tokenizer with an EOS token",
        )


def _trained(sight: Sight) -> Iterator[Finding]:
    tokens = sum(len(e) for e in sight.examples)
    trained = sum(e.num_trained for e in sight.examples)
    if sight.examples and trained < FEW_TRAINED * tokens:
        yield Finding(
            "few-trained",
            "warn",
            f"only {share(trained, tokens)} of the tokens are learned: most of the time goes into "
            "reading prompts",
            mend="shorter prompts, or --train-on all",
        )
