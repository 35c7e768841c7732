"""The metrics: what each needs, its scale, and per-record statistics that resamples add up.

Every corpus metric here is a function of a *sum over records* of a few numbers: BLEU of matched and
possible n-grams and lengths, macro F1 of true positives, predicted and true counts per class,
perplexity of negative log-likelihood and tokens. So a metric is a pair of functions: `statistics`
makes a matrix (records, k) once, and `value` maps sums of its rows (..., k) to scores (...). A
bootstrap of 2,000 resamples is then one matrix product, and the value on the full set is the known
library's own corpus score: tests hold BLEU and chrF equal to sacrebleu, ROUGE-L to rouge-score, the
classification scores to scikit-learn.

Scales: perplexity from 1, loss in nats per token; `bleu`, `chrf`, `rouge_l` from 0 to 100 (as
papers print them); `matthews` from -1 to 1; everything else from 0 to 1.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from lorica.errors import ConfigError, DataError, nearest
from lorica.tasks.task import Prediction

Needs = Literal["nll", "text", "label"]
Array = np.ndarray
LARGEST_EXPONENT = math.log(np.finfo(np.float64).max)


@dataclass(frozen=True)
class Metric:
    """One way to score predictions.

    Attributes:
        name: the word in settings, tables and run.json.
        needs: what a prediction must carry: "nll" (teacher-forced likelihood), "text" (a generated
            text and references) or "label" (a predicted and a true label index).
        higher_is_better: False for loss and perplexity.
        scale: the range of the score, for tables.
        statistics: predictions -> (records, k) float64, whose rows may be added up.
        value: sums (..., k) -> scores (...); nan where the sums leave the score undefined.
        proportion: True where the score is the share of records that are right (0 or 1 each), so
            that Wilson's interval and McNemar's test apply.
    """

    name: str
    needs: Needs
    higher_is_better: bool
    scale: str
    statistics: Callable[[Sequence[Prediction]], Array]
    value: Callable[[Array], Array]
    proportion: bool = False


def find_metrics(names: Sequence[str]) -> list[Metric]:
    """The metrics of these names, in this order.

    Raises:
        ConfigError: for every unknown or repeated name at once, with the nearest known name.
    """
    if isinstance(names, str):
        names = [names]
    problems = []
    for name in dict.fromkeys(names):
        if name not in METRICS:
            near = nearest(name, METRICS)
            problems.append(
                f"unknown metric {name!r}" + (f"; did you mean {near!r}?" if near else "")
            )
        elif list(names).count(name) > 1:
            problems.append(f"metric {name!r} is named more than once")
    if problems or not names:
        raise ConfigError(
            "these metrics cannot be computed" if names else "no metric is named",
            problems=problems,
            expected="one or more of " + ", ".join(METRICS),
        )
    return [METRICS[name] for name in names]


def check_inputs(metrics: Iterable[Metric], predictions: Sequence[Prediction]) -> None:
    """Refuse predictions that lack what a metric needs; all lacks in one error.

    Raises:
        DataError: no predictions, or some without the likelihood, text, label, references, slots
            or marks that a metric needs.
    """
    if not predictions:
        raise DataError("there are no predictions to score", mend="score at least one record")
    problems = []
    for metric in metrics:
        lacks = [_lack(metric, prediction) for prediction in predictions]
        for lack in dict.fromkeys(lack for lack in lacks if lack):
            rows = [str(row) for row, found in enumerate(lacks) if found == lack]
            shown = ", ".join(rows[:5]) + (" ..." if len(rows) > 5 else "")
            problems.append(f"{metric.name}: {len(rows)} of {len(lacks)} records {lack} ({shown})")
        key = ASKED_IN_RECORDS.get(metric.name)
        if key and not any(_values(one, key) for one in predictions):
            problems.append(f"{metric.name}: no record has a list of values in its key {key!r}")
    if problems:
        raise DataError(
            "these metrics lack their inputs",
            problems=problems,
            mend="leave the metric out, or predict again with what it needs",
        )


def _lack(metric: Metric, prediction: Prediction) -> str | None:
    """What `metric` misses in `prediction`, in words, or None."""
    output, references = prediction.output, prediction.references
    if metric.needs == "nll":
        if not math.isfinite(prediction.nll):
            return "have no finite negative log-likelihood"
        return None if prediction.num_tokens > 0 else "have no trained token"
    if metric.needs == "label":
        return _label_lack(metric, output, references)
    if not isinstance(output, str):
        return "have no generated text"
    if metric.name in ASKED_IN_RECORDS:
        return None
    if not references:
        return "have no reference"
    return (
        None
        if all(isinstance(one, str) for one in references)
        else "have a reference that is no text"
    )


def _label_lack(metric: Metric, output: object, references: Sequence[object]) -> str | None:
    if not _is_index(output):
        return "have no predicted label index"
    if len(references) != 1 or not _is_index(references[0]):
        return "have no single true label index"
    if metric.name in BINARY and not {output, references[0]} <= {0, 1}:
        return f"have a label other than 0 and 1 (for more classes use macro_{metric.name})"
    return None


def _is_index(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        return False
    return int(value) >= 0


# --- likelihood -----------------------------------------------------------------------------------


def _likelihood(predictions: Sequence[Prediction]) -> Array:
    return np.array([[one.nll, one.num_tokens] for one in predictions], dtype=np.float64)


def _mean(sums: Array) -> Array:
    """Sums (..., 2) of an amount and of what it is counted over -> their ratio."""
    return _ratio(sums[..., 0], sums[..., 1])


def _perplexity(sums: Array) -> Array:
    # Above exp(709) a float overflows; a base that bad is only "worse than can be written".
    return np.exp(np.minimum(_mean(sums), LARGEST_EXPONENT))


def _ratio(part: Array, whole: Array) -> Array:
    """part / whole, nan where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


# --- labels ---------------------------------------------------------------------------------------


def _labels(predictions: Sequence[Prediction]) -> tuple[Array, Array]:
    """True and predicted label indices, (records,) each."""
    truth = np.array([one.references[0] for one in predictions], dtype=np.int64)
    return truth, np.array([one.output for one in predictions], dtype=np.int64)


def _right_labels(predictions: Sequence[Prediction]) -> Array:
    truth, output = _labels(predictions)
    return np.stack([truth == output, np.ones(len(truth))], axis=1).astype(np.float64)


def _class_counts(predictions: Sequence[Prediction]) -> Array:
    """One-hot true positives, predicted and true classes side by side: (records, 3 * classes)."""
    truth, output = _labels(predictions)
    classes, place = np.unique(np.concatenate([truth, output]), return_inverse=True)
    one_hot = np.eye(len(classes))[place].reshape(2, len(truth), len(classes))
    return np.concatenate([one_hot[0] * one_hot[1], one_hot[1], one_hot[0]], axis=1)


def _positive_counts(predictions: Sequence[Prediction]) -> Array:
    truth, output = _labels(predictions)
    return np.stack([(truth == 1) & (output == 1), output == 1, truth == 1], axis=1).astype(
        np.float64
    )


def _precision_recall_f1(sums: Array) -> tuple[Array, Array, Array]:
    """Per class, from (..., 3 * classes); 0 where undefined, as scikit-learn has it."""
    hit, predicted, true = np.split(sums, 3, axis=-1)
    parts = _ratio(hit, predicted), _ratio(hit, true), _ratio(2 * hit, predicted + true)
    precision, recall, f1 = (np.nan_to_num(part) for part in parts)
    return precision, recall, f1


def _of_positive_class(which: int) -> Callable[[Array], Array]:
    return lambda sums: _precision_recall_f1(sums)[which][..., 0]


def _macro(which: int) -> Callable[[Array], Array]:
    """Mean over the classes that occur in truth or output, as scikit-learn's default label set."""

    def value(sums: Array) -> Array:
        _, predicted, true = np.split(sums, 3, axis=-1)
        present = predicted + true > 0
        return _ratio((_precision_recall_f1(sums)[which] * present).sum(-1), present.sum(-1))

    return value


def _matthews(sums: Array) -> Array:
    """Gorodkin's correlation (two classes: Matthews'); 0 where a side has only one class."""
    hit, predicted, true = np.split(sums, 3, axis=-1)
    count, right = true.sum(-1), hit.sum(-1)
    covariance = right * count - (predicted * true).sum(-1)
    spread = (count**2 - (predicted**2).sum(-1)) * (count**2 - (true**2).sum(-1))
    return np.nan_to_num(_ratio(covariance, np.sqrt(np.maximum(spread, 0.0))))


# --- text -----------------------------------------------------------------------------------------


def _text(value: object) -> str:
    """Text with each run of white space as one blank."""
    return " ".join(str(value).split())


def _texts(predictions: Sequence[Prediction]) -> list[tuple[str, list[str]]]:
    return [(str(one.output), [str(text) for text in one.references]) for one in predictions]


def _exact(predictions: Sequence[Prediction]) -> Array:
    pairs = _texts(predictions)
    right = [_text(output) in {_text(one) for one in references} for output, references in pairs]
    return np.stack([np.array(right, dtype=np.float64), np.ones(len(right))], axis=1)


ASKED_IN_RECORDS = {"slot_accuracy": "slots", "style_marks": "marks"}
"""Metric -> the key of a record that lists what its output is searched for."""


def _values(prediction: Prediction, key: str) -> list[str]:
    values = prediction.record.get(key) or ()
    return [] if isinstance(values, str) else [str(value) for value in values]


def _slot_hits(predictions: Sequence[Prediction]) -> Array:
    rows = []
    for one in predictions:
        output, values = _text(one.output).casefold(), _values(one, "slots")
        rows.append(
            [sum(_occurs(_text(value).casefold(), output) for value in values), len(values)]
        )
    return np.array(rows, dtype=np.float64)


def _marked(predictions: Sequence[Prediction]) -> Array:
    """1 for an output that holds a mark of its record; records that list none do not count."""
    rows = []
    for one in predictions:
        output = _text(one.output).casefold()
        marks = [_text(mark).casefold() for mark in _values(one, "marks")]
        rows.append([any(_occurs(mark, output) for mark in marks), bool(marks)])
    return np.array(rows, dtype=np.float64)


def _occurs(value: str, text: str) -> bool:
    """Whether `value` stands in `text` as whole words, so that "5" is not found in "15".

    Only ASCII letters and digits make a word's edge: scripts without blanks have none.
    """
    return re.search(rf"(?<![0-9a-z]){re.escape(value)}(?![0-9a-z])", text) is not None


# sacrebleu offers no public door to per-segment statistics; `_extract_corpus_statistics` is what
# its own significance tests add up, unchanged since 2.0. Tests hold the scores to `corpus_score`.


def _sacrebleu_counts(metric: BLEU | CHRF) -> Callable[[Sequence[Prediction]], Array]:
    def statistics(predictions: Sequence[Prediction]) -> Array:
        pairs = _texts(predictions)
        outputs = [output for output, _ in pairs]
        longest = max(len(references) for _, references in pairs)
        streams: Any = [
            [refs[place] if place < len(refs) else None for _, refs in pairs]
            for place in range(longest)
        ]
        return np.array(metric._extract_corpus_statistics(outputs, streams), dtype=np.float64)

    return statistics


def _bleu(sums: Array) -> Array:
    """BLEU (Papineni et al. 2002), smoothed exponentially as sacrebleu does by default.

    Sums: (..., 10) = output length, reference length, 4 matched, 4 possible n-gram counts.
    """
    length, reference, hit, possible = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    # The k-th order without a match counts as 1 / 2^k matches.
    missed = (hit == 0) & (possible > 0)
    smoothed = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), hit)
    precisions = np.nan_to_num(_ratio(smoothed, possible))
    with np.errstate(divide="ignore"):  # log 0 = -inf gives the 0 that is meant
        geometric_mean = np.exp(np.log(precisions).mean(-1))
    brevity = np.exp(np.minimum(0.0, 1.0 - np.nan_to_num(_ratio(reference, length), nan=np.inf)))
    return np.where((hit > 0).any(-1), 100.0 * geometric_mean * brevity, 0.0)


def _chrf(sums: Array) -> Array:
    """chrF2 (Popovic 2015); sums: (..., 18) = output, reference, matched count per order."""
    output, reference, hit = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    counted = (output > 0) & (reference > 0)
    orders = np.maximum(counted.sum(-1), 1)
    precision = (np.nan_to_num(_ratio(hit, output)) * counted).sum(-1) / orders
    recall = (np.nan_to_num(_ratio(hit, reference)) * counted).sum(-1) / orders
    beta_squared = CHRF.BETA**2
    above = 100.0 * (1 + beta_squared) * precision * recall
    return np.nan_to_num(_ratio(above, beta_squared * precision + recall))


class _Words(Tokenizer):
    """rouge-score's tokens (runs of a-z and 0-9, lower case) and the words of other scripts.

    rouge-score drops everything outside a-z and 0-9, which gives 0 for any Chinese text. Latin text
    gets exactly its tokens; other alphabets get their words; Chinese, Japanese and Korean
    characters stand alone.
    """

    _east_asian = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
    _pattern = re.compile(rf"[a-z0-9]+|[{_east_asian}]|[^\W_\u0000-\u024f{_east_asian}]+")

    def tokenize(self, text: str) -> list[str]:
        return self._pattern.findall(text.lower())


def _rouge_l_scores(predictions: Sequence[Prediction]) -> Array:
    """Best F-measure over the references, per record (Lin 2004)."""
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    best = [
        scorer.score_multi(refs, output)["rougeL"].fmeasure for output, refs in _texts(predictions)
    ]
    return np.stack([100.0 * np.array(best, dtype=np.float64), np.ones(len(best))], axis=1)


BINARY = ("precision", "recall", "f1")

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("loss", "nll", False, "nats per token, from 0", _likelihood, _mean),
        Metric("perplexity", "nll", False, "from 1", _likelihood, _perplexity),
        Metric("exact_match", "text", True, "0 to 1", _exact, _mean, proportion=True),
        Metric("slot_accuracy", "text", True, "0 to 1", _slot_hits, _mean),
        Metric("style_marks", "text", True, "0 to 1", _marked, _mean),
        Metric("bleu", "text", True, "0 to 100", _sacrebleu_counts(BLEU(force=True)), _bleu),
        Metric("chrf", "text", True, "0 to 100", _sacrebleu_counts(CHRF()), _chrf),
        Metric("rouge_l", "text", True, "0 to 100", _rouge_l_scores, _mean),
        Metric("accuracy", "label", True, "0 to 1", _right_labels, _mean, proportion=True),
        Metric("precision", "label", True, "0 to 1", _positive_counts, _of_positive_class(0)),
        Metric("recall", "label", True, "0 to 1", _positive_counts, _of_positive_class(1)),
        Metric("f1", "label", True, "0 to 1", _positive_counts, _of_positive_class(2)),
        Metric("macro_precision", "label", True, "0 to 1", _class_counts, _macro(0)),
        Metric("macro_recall", "label", True, "0 to 1", _class_counts, _macro(1)),
        Metric("macro_f1", "label", True, "0 to 1", _class_counts, _macro(2)),
        Metric("matthews", "label", True, "-1 to 1", _class_counts, _matthews),
    )
}
