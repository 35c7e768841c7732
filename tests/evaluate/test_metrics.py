"""Every metric against the library that defines it, on data with known answers and on ugly data."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sklearn import metrics as sklearn

from lorica.errors import ConfigError, DataError
from lorica.evaluate.metrics import METRICS, check_inputs, find_metrics
from lorica.tasks.task import Prediction

LINE = "the a cat dog sat on near Café river 5 15 £20-25 cheap, pub. 'Blue Spice'"
WORDS = [*LINE.split(), "\n"]


def text(output, *references, **record):
    return Prediction(record, math.nan, 0, output, references)


def label(output, truth):
    return Prediction({}, math.nan, 0, output, (truth,))


def likelihood(nll, num_tokens):
    return Prediction({}, nll, num_tokens, None, ())


def value(name, predictions):
    check_inputs([METRICS[name]], predictions)
    return float(METRICS[name].value(METRICS[name].statistics(predictions).sum(0)))


def random_texts(seed, *, num_records=37):
    """Outputs (some empty, some exact) with one to five references each."""
    draw = random.Random(seed)
    rows = []
    for _ in range(num_records):
        references = [
            " ".join(draw.choices(WORDS, k=draw.randint(1, 17))) for _ in range(draw.randint(1, 5))
        ]
        output = " ".join(draw.choices(WORDS, k=draw.choice([0, 1, 2, 3, 9, 21])))
        rows.append(text(draw.choice([output, references[-1]]), *references))
    return rows


def streams(predictions):
    longest = max(len(one.references) for one in predictions)
    padded = [[*one.references, *[None] * longest][:longest] for one in predictions]
    return [one.output for one in predictions], [
        list(stream) for stream in zip(*padded, strict=True)
    ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("name", "library"), [("bleu", BLEU(force=True)), ("chrf", CHRF())])
def test_corpus_score_is_sacrebleus(name, library, seed):
    predictions = random_texts(seed)
    assert value(name, predictions) == pytest.approx(
        library.corpus_score(*streams(predictions)).score, abs=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ab \u4f60."), st.lists(st.text("ab \u4f60."), min_size=1, max_size=3)),
        min_size=1,
        max_size=5,
    )
)
def test_corpus_score_is_sacrebleus_on_ugly_text(pairs):
    predictions = [text(output, *references) for output, references in pairs]
    for name, library in (("bleu", BLEU(force=True)), ("chrf", CHRF())):
        expected = library.corpus_score(*streams(predictions)).score
        assert value(name, predictions) == pytest.approx(expected, abs=1e-9)


def test_value_of_many_sums_at_once_is_the_value_of_each():
    predictions = random_texts(3)
    for name in ("bleu", "chrf", "rouge_l", "exact_match"):
        metric = METRICS[name]
        table = metric.statistics(predictions)
        draws = np.random.default_rng(0).integers(0, 3, size=(7, len(table))).astype(float)
        together = metric.value(draws @ table)
        assert together.shape == (7,)
        assert together == pytest.approx([float(metric.value(row @ table)) for row in draws])


def test_rouge_l_is_rouge_scores_best_reference():
    predictions = random_texts(5)
    scorer = RougeScorer(["rougeL"])
    best = [
        max(scorer.score(reference, one.output)["rougeL"].fmeasure for reference in one.references)
        for one in predictions
    ]
    assert value("rouge_l", predictions) == pytest.approx(100 * np.mean(best))


def test_rouge_l_reads_other_scripts():
    assert value("rouge_l", [text("你好世界", "你好,世界!")]) == pytest.approx(100.0)
    assert value("rouge_l", [text("привет мир", "привет всем")]) == pytest.approx(50.0)
    assert value("rouge_l", [text("", "a")]) == 0.0


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (2, 1), (3, 2), (7, 3), (31, 4)])
def test_classification_scores_are_scikit_learns(classes, seed):
    generator = np.random.default_rng(seed)
    truth = generator.integers(classes, size=133)
    output = np.where(generator.random(133) < 0.4, truth, generator.integers(classes, size=133))
    predictions = [label(int(a), int(b)) for a, b in zip(output, truth, strict=True)]
    macro = {"average": "macro", "zero_division": 0}
    expected = {
        "accuracy": sklearn.accuracy_score(truth, output),
        "macro_precision": sklearn.precision_score(truth, output, **macro),
        "macro_recall": sklearn.recall_score(truth, output, **macro),
        "macro_f1": sklearn.f1_score(truth, output, **macro),
        "matthews": sklearn.matthews_corrcoef(truth, output),
    }
    if classes == 2:
        expected |= {
            "precision": sklearn.precision_score(truth, output),
            "recall": sklearn.recall_score(truth, output),
            "f1": sklearn.f1_score(truth, output),
        }
    assert {name: value(name, predictions) for name in expected} == pytest.approx(expected)


def test_classification_scores_with_one_class_only():
    predictions = [label(0, 0), label(0, 0), label(0, 0)]
    assert value("macro_f1", predictions) == 1.0
    assert value("matthews", predictions) == 0.0
    assert value("f1", predictions) == 0.0
    assert value("accuracy", predictions) == 1.0


def test_perplexity_weighs_tokens_not_records():
    predictions = [likelihood(2.0, 1), likelihood(0.0, 9)]
    assert value("loss", predictions) == pytest.approx(0.2)
    assert value("perplexity", predictions) == pytest.approx(math.exp(0.2))
    assert value("perplexity", [likelihood(1e6, 1)]) == pytest.approx(np.finfo(float).max)


def test_exact_match_takes_any_reference_and_ignores_white_space():
    predictions = [text(" a\n b ", "x", "a b"), text("A b", "a b"), text("", "a")]
    assert value("exact_match", predictions) == pytest.approx(1 / 3)


def test_slot_accuracy_counts_whole_values_over_all_records():
    predictions = [
        text("Blue  spice costs 15.", slots=["Blue Spice", "5"]),
        text("no slots here"),
        text("五星酒店在河边", slots=["河边"]),
    ]
    assert value("slot_accuracy", predictions) == pytest.approx(2 / 3)


def test_style_marks_counts_the_outputs_that_hold_one():
    predictions = [
        text("Meow! Fish. Nya!", marks=["meow", "nya"]),
        text("The meowing went on.", marks=["meow", "nya"]),
        text("Fish, NYA.", marks=["nya"]),
        text("no marks asked for"),
    ]
    assert value("style_marks", predictions) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="no record has a list of values in its key 'marks'"):
        check_inputs(find_metrics(["style_marks"]), [text("a"), text("nya", marks="nya")])


def test_unknown_names_are_refused_together_with_the_nearest():
    with pytest.raises(ConfigError) as caught:
        find_metrics(["acuracy", "bleu", "bleu", "zzz"])
    message = str(caught.value)
    assert "unknown metric 'acuracy'; did you mean 'accuracy'?" in message
    assert "metric 'bleu' is named more than once" in message
    assert "unknown metric 'zzz'\n" in message
    assert "one or more of loss, perplexity" in message
    with pytest.raises(ConfigError, match="no metric is named"):
        find_metrics([])


def test_missing_inputs_are_an_error_not_a_nan():
    predictions = [
        text("a", "a"),
        Prediction({}, math.nan, 0, None, ("a",)),
        text("b"),
        label(3, 1),
    ]
    chosen = find_metrics(["perplexity", "bleu", "f1", "slot_accuracy"])
    with pytest.raises(DataError) as caught:
        check_inputs(chosen, predictions)
    problems = caught.value.problems
    assert (
        "perplexity: 4 of 4 records have no finite negative log-likelihood (0, 1, 2, 3)" in problems
    )
    assert "bleu: 2 of 4 records have no generated text (1, 3)" in problems
    assert "bleu: 1 of 4 records have no reference (2)" in problems
    assert "f1: 3 of 4 records have no predicted label index (0, 1, 2)" in problems
    assert any(
        "other than 0 and 1 (for more classes use macro_f1) (3)" in line for line in problems
    )
    assert "slot_accuracy: no record has a list of values in its key 'slots'" in problems
    with pytest.raises(DataError, match="no predictions"):
        check_inputs(chosen, [])


@pytest.mark.parametrize(
    ("name", "prediction", "lack"),
    [
        ("loss", likelihood(1.0, 0), "have no trained token"),
        ("loss", likelihood(math.inf, 3), "have no finite negative log-likelihood"),
        ("accuracy", label(True, 1), "have no predicted label index"),
        ("accuracy", label(1, "1"), "have no single true label index"),
        ("accuracy", label(1, -1), "have no single true label index"),
        ("chrf", text("a", 4), "have a reference that is no text"),
    ],
)
def test_each_lack_is_named(name, prediction, lack):
    with pytest.raises(DataError) as caught:
        check_inputs([METRICS[name]], [prediction])
    assert lack in str(caught.value)


def test_table_is_consistent():
    assert all(name == metric.name for name, metric in METRICS.items())
    assert {metric.needs for metric in METRICS.values()} == {"nll", "text", "label"}
    lower = {name for name, metric in METRICS.items() if not metric.higher_is_better}
    assert lower == {"loss", "perplexity"}
    shares = {name for name, metric in METRICS.items() if metric.proportion}
    assert shares == {"accuracy", "exact_match"}
