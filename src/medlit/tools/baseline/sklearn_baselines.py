"""Baselines without a language model: the majority class, and TF-IDF with logistic regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from medlit.errors import UserError
from medlit.evaluation.results import FloatArray, IntArray, Results
from medlit.report.systems import System

if TYPE_CHECKING:
    from datasets import Dataset

    from medlit.data.datamodule import TranscriptionDataModule


@dataclass(frozen=True)
class BaselineData:
    """The notes that baselines are fitted and scored on, not tokenised.

    Attributes:
        names: the K labels.
        train: canonical notes of the training split.
        test: canonical notes; those that the model was tested on, if there is a model.
        tokens: in each test note's prompt, (N,); 0 without a model.
        cut_tokens: cut from each test note, (N,).
    """

    names: tuple[str, ...]
    train: Dataset
    test: Dataset
    tokens: IntArray
    cut_tokens: IntArray

    @classmethod
    def read(cls, data: TranscriptionDataModule, tested: Results | None) -> BaselineData:
        """Read and split the source as `medlit fit` does.

        Args:
            data: the settings.
            tested: the model's results; the baselines answer the same notes.

        Raises:
            UserError: the source cannot be used, or its test split is not what the model was tested on.
        """
        notes = data.read_splits().notes
        if "test" not in notes:
            raise UserError(
                f"data.source: {data.source} has no test split; add one, or set data.split.kind to 'grouped'."
            )
        assert data.label_set is not None
        names, test = data.label_set.names, notes["test"]
        if tested is None:
            zeros = np.zeros(len(test), dtype=np.int64)
            return cls(names, notes["train"], test, zeros, zeros)
        position = {note: i for i, note in enumerate(test["id"][:])}
        if tested.names != names or not all(note in position for note in tested.ids):
            raise UserError(
                "run_dir: the model was not tested on this test split; leave the data settings to those of the run, or"
                " test it again."
            )
        test = test.select([position[note] for note in tested.ids])
        if test["text_hash"][:] != tested.text_hashes:
            raise UserError("run_dir: the notes have other texts than when the model was tested; test it again.")
        return cls(names, notes["train"], test, tested.tokens, tested.cut_tokens)

    def label_ids(self, notes: Dataset) -> IntArray:
        """Label ids of notes, (N,)."""
        ids = {name: i for i, name in enumerate(self.names)}
        return np.array([ids[name] for name in notes["specialty"][:]], dtype=np.int64)

    def system(self, name: str, probabilities: FloatArray) -> System:
        """Score a baseline by the K probabilities that it gives to each test note, (N, K)."""
        results = Results(
            names=self.names,
            rows=np.arange(len(self.test)),
            ids=self.test["id"][:],
            text_hashes=self.test["text_hash"][:],
            truth=self.label_ids(self.test),
            answer=probabilities.argmax(axis=1),
            probabilities=probabilities,
            tokens=self.tokens,
            cut_tokens=self.cut_tokens,
        )
        return System.score(name, results)


def majority(data: BaselineData) -> System:
    """Answer every note with the most frequent specialty in training; probabilities are the shares in training."""
    from sklearn.dummy import DummyClassifier

    labels = data.label_ids(data.train)
    model = DummyClassifier(strategy="prior").fit(np.zeros((len(labels), 1)), labels)
    probabilities = model.predict_proba(np.zeros((len(data.test), 1)))
    return data.system("majority", _all_labels(probabilities, model.classes_, len(data.names)))


def tfidf(data: BaselineData) -> System:
    """TF-IDF of words and word pairs with logistic regression, a strong baseline for long texts with key words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10, class_weight="balanced", max_iter=1000),
    )
    model.fit(data.train["transcription"][:], data.label_ids(data.train))
    probabilities = model.predict_proba(data.test["transcription"][:])
    return data.system("tfidf", _all_labels(probabilities, model.classes_, len(data.names)))


def _all_labels(probabilities: FloatArray, classes: IntArray, k: int) -> FloatArray:
    """Add columns of zeros for labels without training notes, (N, K)."""
    out = np.zeros((len(probabilities), k))
    out[:, classes] = probabilities
    return out
