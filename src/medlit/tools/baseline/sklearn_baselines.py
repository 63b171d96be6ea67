"""Baselines that know no language model: the commonest specialty, and words counted."""

from __future__ import annotations

import numpy as np

from medlit.evaluation.results import FloatArray, IntArray
from medlit.report.systems import System
from medlit.tools.baseline.notes import TestedNotes


def majority(notes: TestedNotes) -> System:
    """Answers every note with the training split's commonest specialty; its probabilities are the shares of all."""
    from sklearn.dummy import DummyClassifier

    labels = notes.labels(notes.train)
    model = DummyClassifier(strategy="prior").fit(np.zeros((len(labels), 1)), labels)
    given = model.predict_proba(np.zeros((len(notes.test), 1)))
    return notes.system("majority", _spread(given, model.classes_, len(notes.label_set)))


def tfidf(notes: TestedNotes) -> System:
    """TF-IDF of words and pairs of words with logistic regression, a strong baseline on text of this kind."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10, class_weight="balanced", max_iter=1000),
    )
    model.fit(notes.train["transcription"][:], notes.labels(notes.train))
    given = model.predict_proba(notes.test["transcription"][:])
    return notes.system("tfidf", _spread(given, model.classes_, len(notes.label_set)))


def _spread(given: FloatArray, classes: IntArray, k: int) -> FloatArray:
    """Columns of the classes that occur in training, set out over all K labels."""
    out = np.zeros((len(given), k))
    out[:, classes] = given
    return out
