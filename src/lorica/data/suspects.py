"""Labels that look wrong, by confident learning.

Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels",
arXiv 1911.00068: a simple classifier (TF-IDF and logistic regression) judges every record in
cross-validation, and a label is suspected where another class is given at least the confidence that
its own records get on average.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from lorica.data.labels import balance
from lorica.data.pack import order
from lorica.data.shapes import Row
from lorica.data.texts import input_of

DRAWN = 20_000
_FOLDS = 5
_FEWEST = 10
"""Records that a class needs to be judged."""
_MOST_CLASSES = 40
_KNOWS = 0.4
"""Share of what the most frequent label gets wrong that the classifier must get right. Below that
(inference, paraphrases) its doubts say more about itself than about the labels."""


@dataclass(frozen=True)
class Suspects:
    """What the classifier thought.

    Attributes:
        rows: (index of the row, label it would have given), the surest first.
        accuracy, majority: of the classifier in cross-validation, and of always saying the most
            frequent label. Where the first is not far above the second there are no suspects.
        judged: how many records were looked at.
    """

    rows: list[tuple[int, str]]
    accuracy: float
    majority: float
    judged: int


def suspects(rows: Sequence[Row], *, seed: int = 0) -> Suspects | None:
    """Labels that look wrong, of at most `DRAWN` records drawn with `seed`; None where there are
    too few records to learn from, or too many classes.
    """
    counts = balance(rows)
    known = {label for label, number in counts.items() if number >= _FEWEST}
    indices = [int(i) for i in order(len(rows), seed=seed) if str(rows[i]["label"]) in known]
    indices = indices[:DRAWN]
    labels = np.array([str(rows[i]["label"]) for i in indices])
    classes, given = np.unique(labels, return_inverse=True)
    if not 2 <= len(classes) <= _MOST_CLASSES or np.bincount(given).min() < _FOLDS:
        return None
    chances = _cross_validated([input_of(rows[i]) for i in indices], given, seed)
    guessed = chances.argmax(1)
    accuracy = float((guessed == given).mean())
    majority = float(np.bincount(given).max() / len(given))
    if accuracy - majority < _KNOWS * (1 - majority):
        return Suspects([], accuracy, majority, len(indices))
    own = chances[np.arange(len(given)), given]
    usual = np.array([own[given == k].mean() for k in range(len(classes))])
    sure = np.where(chances >= usual, chances, 0.0)
    wrong = np.flatnonzero((sure.argmax(1) != given) & (sure.max(1) > 0))
    margin = sure[wrong].max(1) - own[wrong]
    ranked = wrong[np.argsort(-margin, kind="stable")]
    found = [(indices[i], str(classes[sure[i].argmax()])) for i in ranked if sure[i].max() > own[i]]
    return Suspects(found, accuracy, majority, len(indices))


def _cross_validated(texts: list[str], given: np.ndarray, seed: int) -> np.ndarray:
    """Chance of every class for every record, from classifiers that did not see it."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=50_000)
    model = make_pipeline(words, LogisticRegression(C=4.0, max_iter=200, tol=1e-3))
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    chances = cross_val_predict(model, texts, given, cv=folds, method="predict_proba")
    return np.asarray(chances)
