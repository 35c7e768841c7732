"""Base against tuned: exact p-values by hand, level and power on simulated data, refusals."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test

from lorica.errors import ConfigError, DataError
from lorica.evaluate.compare import compare
from lorica.evaluate.score import score
from lorica.tasks.task import Prediction


def labels(right):
    return [Prediction({"n": n}, math.nan, 1, int(one), (1,)) for n, one in enumerate(right)]


def likelihoods(values):
    return [Prediction({"n": n}, float(nll), 1, None, ()) for n, nll in enumerate(values)]


def texts(outputs, reference="the cat sat on the mat"):
    return [Prediction({"n": n}, math.nan, 0, one, (reference,)) for n, one in enumerate(outputs)]


def test_accuracy_uses_mcnemars_exact_test():
    base = labels([0] * 12 + [1] * 2 + [1] * 30 + [0] * 6)
    tuned = labels([1] * 12 + [0] * 2 + [1] * 30 + [0] * 6)
    found = compare(base, tuned, ["accuracy"])["accuracy"]
    assert found.p == pytest.approx(binomtest(12, 14).pvalue)
    assert (found.base, found.tuned) == (0.64, 0.84)
    assert found.difference == pytest.approx(0.2)
    assert found.low < 0.2 < found.high
    assert (found.verdict, found.num_records) == ("better", 50)


def test_row_of_run_json():
    found = compare(labels([0, 1, 1]), labels([1, 1, 1]), ["accuracy"])["accuracy"]
    keys = {"base", "tuned", "difference", "low", "high", "p", "num_records", "higher_is_better"}
    assert keys <= asdict(found).keys()
    assert all(
        isinstance(asdict(found)[key], float) for key in keys - {"num_records", "higher_is_better"}
    )


def test_three_records_are_never_evidence():
    found = compare(likelihoods([3.0, 3.0, 3.0]), likelihoods([1.0, 1.0, 1.0]), ["loss"])["loss"]
    assert found.p == 0.25  # 2 of the 2 ** 3 ways to swap are as extreme
    assert (found.low, found.high) == (-2.0, -2.0)
    assert found.verdict == "no evidence"
    assert "No evidence of a difference in loss: 3 -> 1" in found.sentence("loss")


def test_enumerated_p_is_scipys_permutation_test():
    generator = np.random.default_rng(3)
    base, tuned = generator.random(9), generator.random(9) - 0.25
    found = compare(likelihoods(base), likelihoods(tuned), ["loss"])["loss"]
    known = permutation_test(
        (tuned, base), lambda a, b: np.mean(a) - np.mean(b), permutation_type="samples"
    )
    assert found.p == pytest.approx(known.pvalue)


def test_sampled_p_is_near_the_enumerated_one():
    generator = np.random.default_rng(4)
    base, tuned = generator.random(10), generator.random(10) - 0.2
    exact = compare(likelihoods(base), likelihoods(tuned), ["loss"])["loss"].p
    sampled = compare(likelihoods(base), likelihoods(tuned), ["loss"], num_resamples=1000)["loss"].p
    assert sampled == pytest.approx(exact, abs=0.05)


def test_lower_is_better_for_loss_and_perplexity():
    generator = np.random.default_rng(5)
    base = generator.random(133) + 1
    found = compare(likelihoods(base), likelihoods(base - 0.1), ["loss", "perplexity"])
    assert {one.verdict for one in found.values()} == {"better"}
    back = compare(likelihoods(base - 0.1), likelihoods(base), ["loss"])["loss"]
    assert back.verdict == "worse"
    assert back.sentence("loss").startswith("The tuned model is worse in loss: ")
    assert "p < 0.001" in back.sentence("loss")


def test_alike_models_give_no_evidence():
    predictions = texts(["the cat sat", "a dog", "on the mat"] * 5)
    for one in compare(predictions, predictions, ["bleu", "chrf", "exact_match"]).values():
        assert (one.difference, one.low, one.high, one.p) == (0.0, 0.0, 0.0, 1.0)
        assert one.verdict == "no evidence"


def test_scores_are_those_of_score_also_with_other_classes_on_each_side():
    generator = np.random.default_rng(6)
    truth = generator.integers(3, size=57)
    sides = []
    for classes in (2, 5):
        output = generator.integers(classes, size=57)
        sides.append(
            [
                Prediction({"n": n}, math.nan, 1, int(a), (int(b),))
                for n, (a, b) in enumerate(zip(output, truth, strict=True))
            ]
        )
    names = ["accuracy", "macro_f1", "matthews"]
    found = compare(*sides, names)
    base, tuned = (score(side, names) for side in sides)
    assert {name: found[name].base for name in names} == pytest.approx(
        {name: base[name].value for name in names}
    )
    assert {name: found[name].tuned for name in names} == pytest.approx(
        {name: tuned[name].value for name in names}
    )


def test_false_alarms_stay_at_their_level_and_real_gains_are_found():
    generator = np.random.default_rng(8)
    alarms = finds = covered = 0
    rounds = 200
    for _ in range(rounds):
        shared = generator.gamma(2.0, size=40)
        base = shared + generator.normal(0, 0.5, size=40)
        alike = shared + generator.normal(0, 0.5, size=40)
        same = compare(likelihoods(base), likelihoods(alike), ["loss"], num_resamples=300)["loss"]
        gain = compare(likelihoods(base), likelihoods(alike - 0.5), ["loss"], num_resamples=300)
        alarms += same.verdict != "no evidence"
        covered += gain["loss"].low <= -0.5 <= gain["loss"].high
        finds += gain["loss"].verdict == "better"
    assert alarms / rounds <= 0.09  # 5 % and sampling error
    assert finds / rounds >= 0.95
    assert 0.89 <= covered / rounds <= 0.99


def test_deterministic_from_the_seed():
    base = texts(["the cat", "cat on the mat", "sat on a mat", "x"] * 4)
    tuned = texts(["the cat sat", "the cat on the mat", "sat on the mat", "on the mat"] * 4)
    first, again = (compare(base, tuned, ["bleu", "rouge_l"], seed=3) for _ in range(2))
    assert first == again
    assert compare(base, tuned, ["bleu"], seed=4)["bleu"].low != first["bleu"].low
    assert first["bleu"] == compare(base, tuned, ["bleu"], seed=3)["bleu"]


def test_other_records_or_another_order_are_refused():
    base = likelihoods([1.0, 2.0, 3.0])
    with pytest.raises(DataError, match="3 predictions and the tuned model 2"):
        compare(base, base[:2], ["loss"])
    with pytest.raises(DataError) as caught:
        compare(base, [base[0], base[2], base[1]], ["loss"])
    assert caught.value.problems == ("2 of 3 positions hold another record, the first at 1",)
    longer = [*base[:2], replace(base[2], num_tokens=4)]
    with pytest.raises(DataError, match="not run on the same records") as caught:
        compare(base, longer, ["loss"])
    assert "another number of trained tokens, the first at 2" in caught.value.problems[0]


def test_names_and_inputs_are_checked():
    base = likelihoods([1.0, 2.0])
    with pytest.raises(ConfigError, match="perplexity"):
        compare(base, base, ["perplexty"])
    with pytest.raises(DataError, match="lack their inputs"):
        compare(base, base, ["bleu"])
