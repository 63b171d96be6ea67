"""A TF-IDF prior: logistic regression over the tokens and token pairs of a prompt, fitted in seconds.

The language model reads a note and the prior counts its words, so they err on different notes. Their probabilities are
multiplied, the prior's to a power that the validation notes choose (a product of experts, Hinton 2002).

Pairs are hashed, and one that only a single note has is left out: the file holds no text and no list of words.

N notes, K labels, F features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.linalg import cholesky, solve_triangular
from scipy.sparse import csr_matrix
from scipy.special import log_softmax

from medlit.data.collate import Prompts
from medlit.data.labels import LabelSet
from medlit.data.notes import specialties_of
from medlit.errors import UserError
from medlit.evaluation.calibration import fit_powers, power_product
from medlit.evaluation.results import FloatArray, IntArray, Results

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfTransformer

PRIOR_FILE = "prior.safetensors"
_BITS = 18  # of a hash
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # Knuth's multiplicative hash
_STRENGTH = 100.0  # C of logistic regression: what inner folds of the baseline choose on hundreds of notes
_MOST_NOTES = 20_000
MOST_WEIGHTS = 4_000_000  # of logistic regression with many labels
SPAN_NOTES = 5_000  # a table of their similarities is 200 MB
_UNSEEN = -14.0  # score of a label without a training note: about one in a million
_LEAST_POWER = 0.05  # of the language model


@dataclass(frozen=True)
class TokenPrior:
    """Log-probabilities of the K labels from a prompt's tokens."""

    buckets: IntArray  # hashes of the features, ascending, (F,)
    idf: FloatArray  # inverse document frequency of each feature, (F,)
    weights: FloatArray  # (F, K)
    bias: FloatArray  # (K,)
    power: float = 1.0  # of its probabilities, where the language model's have 1

    @classmethod
    def fit(cls, rows: Dataset, label_set: LabelSet) -> TokenPrior | None:
        """Fit it to tokenised training notes, at most 20,000; None if they have one label or no feature in common."""
        from sklearn.linear_model import LogisticRegression

        if len(rows) > _MOST_NOTES:
            rows = rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:_MOST_NOTES]))
        notes, labels = examples_of(rows, label_set)
        counts = _counts(*_tokens(rows), len(rows))
        frequency = counts.getnnz(axis=0)  # notes that have each hash; all of them have those of the instruction
        common = np.flatnonzero((frequency > 1) & (frequency < len(rows)))
        if len(set(labels.tolist())) < 2 or not len(common):
            return None
        buckets = np.sort(common[np.argsort(-frequency[common], kind="stable")[: MOST_WEIGHTS // len(label_set)]])
        tfidf = _tfidf().fit(counts[:, buckets])
        x = tfidf.transform(counts[:, buckets])
        regression = LogisticRegression(C=_STRENGTH, class_weight="balanced", max_iter=1000)
        if len(rows) > min(SPAN_NOTES, len(buckets)):
            coefficients = regression.fit(x[notes], labels).coef_
        else:
            factor = span(x)
            fitted = regression.fit(factor[notes], labels).coef_
            coefficients = (x.T @ solve_triangular(factor, fitted.T, lower=True, trans="T")).T
        weights, bias = np.zeros((len(buckets), len(label_set))), np.full(len(label_set), _UNSEEN)
        if len(regression.classes_) == 2:  # scikit-learn gives the second one's log-odds alone
            weights[:, regression.classes_[1]] = coefficients[0]
            bias[regression.classes_] = 0.0, regression.intercept_[0]
        else:
            weights[:, regression.classes_], bias[regression.classes_] = coefficients.T, regression.intercept_
        return cls(buckets, tfidf.idf_, weights.astype(np.float16).astype(np.float64), bias)

    def of_rows(self, rows: Dataset) -> FloatArray:
        """Log-probabilities of tokenised notes, (N, K)."""
        return self._log_probabilities(*_tokens(rows), len(rows))

    def of_prompts(self, prompts: Prompts) -> FloatArray:
        """Log-probabilities of B prompts, (B, K)."""
        mask = prompts.attention_mask.cpu().numpy() > 0
        return self._log_probabilities(prompts.input_ids.cpu().numpy()[mask], mask.nonzero()[0], len(mask))

    def _log_probabilities(self, tokens: IntArray, notes: IntArray, n: int) -> FloatArray:
        tfidf = _tfidf()
        tfidf.idf_ = self.idf
        x = tfidf.transform(_counts(tokens, notes, n)[:, self.buckets])
        scores: FloatArray = log_softmax(x @ self.weights + self.bias, axis=1)
        return scores

    def with_power(self, results: Results, of_split: FloatArray) -> tuple[TokenPrior, Results]:
        """With the power by which any of the validation notes' labels is most probable, and their results with it.

        Args:
            results: the language model's own, with probabilities.
            of_split: this prior's log-probabilities of the whole split, by `of_rows`.
        """
        assert results.probabilities is not None
        logs = np.log(np.maximum(results.probabilities, np.finfo(np.float64).tiny)), of_split[results.rows]
        of_model, of_prior = fit_powers(logs, results.label_mask)
        prior = replace(self, power=of_prior / max(of_model, _LEAST_POWER))
        product = power_product(logs, (1.0, prior.power))
        return prior, replace(results, probabilities=product, answer=product.argmax(axis=1))

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        arrays = {name: getattr(self, name) for name in ("buckets", "idf", "bias")}
        arrays["weights"] = self.weights.astype(np.float16)
        save_file(arrays, path, metadata={"power": json.dumps(self.power)})

    @classmethod
    def load(cls, path: Path) -> TokenPrior:
        """Read a file that `save` wrote; a UserError if it is another file."""
        try:
            with safe_open(path, "np") as file:
                arrays = {name: file.get_tensor(name) for name in ("buckets", "idf", "weights", "bias")}
                arrays["weights"] = arrays["weights"].astype(np.float64)
                return cls(**arrays, power=float(json.loads(file.metadata()["power"])))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"model.decoding.prior: {path} is damaged; copy the adapter's folder again.") from error


def examples_of(rows: Dataset, label_set: LabelSet) -> tuple[IntArray, IntArray]:
    """Note and label id of each example, (E,): a note with several labels stands once for each."""
    own = specialties_of(rows)
    known = {name: label_set.index(name) for name in set(chain.from_iterable(own))}
    pairs = [(note, known[name]) for note, names in enumerate(own) for name in names]
    notes, labels = np.array(pairs, dtype=np.int64).T
    return notes, labels


def span(x: csr_matrix) -> FloatArray:
    """Coordinates of N notes in an orthonormal basis of their span, (N, N) lower triangular.

    Logistic regression has the same solution there, for few notes with many words in a second instead of minutes.
    """
    factor: FloatArray = cholesky((x @ x.T).toarray() + 1e-9 * np.eye(x.shape[0]), lower=True)
    return factor


def _tokens(rows: Dataset) -> tuple[IntArray, IntArray]:
    """Tokens of all prompts, one after another, and the note of each."""
    column = rows.with_format("arrow")[:]["input_ids"].combine_chunks()
    lengths = np.diff(column.offsets.to_numpy())
    return column.flatten().to_numpy(), np.repeat(np.arange(len(rows)), lengths)


def _counts(tokens: IntArray, notes: IntArray, n: int) -> csr_matrix:
    """How often each hash of a token or a pair of tokens occurs in each of N notes, (N, 2^18)."""
    single, within = tokens.astype(np.uint64) + np.uint64(1), notes[1:] == notes[:-1]
    pairs = (single[:-1] << np.uint64(32)) + single[1:]
    hashes = (np.concatenate([single, pairs[within]]) * _MULTIPLIER) >> np.uint64(64 - _BITS)
    cells = np.concatenate([notes, notes[1:][within]]), hashes.astype(np.int64)
    return csr_matrix((np.ones(len(hashes)), cells), shape=(n, 1 << _BITS))


def _tfidf() -> TfidfTransformer:
    """Makes rows of (1 + log count) x idf with a Euclidean norm of 1 from counts, (N, F)."""
    from sklearn.feature_extraction.text import TfidfTransformer

    return TfidfTransformer(sublinear_tf=True)
