"""A TF-IDF prior: logistic regression over the tokens and token pairs of a prompt, fitted in seconds.

The language model reads a note and the prior counts its words, so they err on different notes. Their probabilities are
multiplied, the prior's to a power that the validation notes choose (a product of experts, Hinton 2002).

Pairs are hashed, and one that only a single note has is left out: the file holds no text and no list of words.

N notes, K labels, F features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medlit.data.labels import LabelSet
from medlit.data.notes import specialties_of
from medlit.errors import UserError
from medlit.evaluation.calibration import fit_powers, power_product
from medlit.evaluation.results import FloatArray, IntArray, Results

if TYPE_CHECKING:
    from datasets import Dataset
    from scipy.sparse import csr_matrix

    from medlit.data.collate import Prompts

PRIOR_FILE = "prior.safetensors"
_BITS = 18  # of a hash
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # Knuth's multiplicative hash
_STRENGTH = 100.0  # C of logistic regression: what inner folds of the baseline choose on hundreds of notes
_MOST_NOTES, _MOST_WEIGHTS = 20_000, 4_000_000
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
        """Fit it to tokenised training notes, at most 20,000 of them; None if they all have one label."""
        from sklearn.linear_model import LogisticRegression

        if len(rows) > _MOST_NOTES:
            rows = rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:_MOST_NOTES]))
        own = specialties_of(rows)
        known = {name: label_set.index(name) for name in set(chain.from_iterable(own))}
        labels = np.array([known[name] for names in own for name in names], dtype=np.int64)
        if len(set(labels.tolist())) < 2:
            return None
        counts = _counts(*_tokens(rows), len(rows))
        notes = np.asarray((counts > 0).sum(axis=0)).ravel()  # that have each feature; every note has the instruction's
        frequent = np.argsort(-notes * (notes < len(rows)), kind="stable")[: _MOST_WEIGHTS // len(label_set)]
        buckets = np.sort(frequent[(notes[frequent] > 1) & (notes[frequent] < len(rows))])
        idf = np.log((1 + len(rows)) / (1 + notes[buckets])) + 1
        x = _tfidf(counts[:, buckets], idf)
        regression = LogisticRegression(C=_STRENGTH, class_weight="balanced", max_iter=1000)
        notes_of_answers = np.repeat(np.arange(len(rows)), [len(names) for names in own])
        if len(rows) > min(SPAN_NOTES, len(buckets)):
            coefficients = regression.fit(x[notes_of_answers], labels).coef_
        else:
            factor = span(x)
            from scipy.linalg import solve_triangular

            fitted = regression.fit(factor[notes_of_answers], labels).coef_
            coefficients = (x.T @ solve_triangular(factor, fitted.T, lower=True, trans="T")).T
        weights, bias = np.zeros((len(buckets), len(label_set))), np.full(len(label_set), _UNSEEN)
        if len(regression.classes_) == 2:  # scikit-learn gives the second one's log-odds alone
            weights[:, regression.classes_[1]] = coefficients[0]
            bias[regression.classes_] = 0.0, regression.intercept_[0]
        else:
            weights[:, regression.classes_], bias[regression.classes_] = coefficients.T, regression.intercept_
        return cls(buckets, idf.astype(np.float32), weights.astype(np.float16), bias.astype(np.float32))

    def of_rows(self, rows: Dataset) -> FloatArray:
        """Log-probabilities of tokenised notes, (N, K)."""
        return self._log_probabilities(*_tokens(rows), len(rows))

    def of_prompts(self, prompts: Prompts) -> FloatArray:
        """Log-probabilities of B prompts, (B, K)."""
        mask = prompts.attention_mask.cpu().numpy() > 0
        return self._log_probabilities(prompts.input_ids.cpu().numpy()[mask], mask.nonzero()[0], len(mask))

    def _log_probabilities(self, tokens: IntArray, notes: IntArray, n: int) -> FloatArray:
        from scipy.special import log_softmax

        x = _tfidf(_counts(tokens, notes, n)[:, self.buckets], self.idf)
        scores: FloatArray = log_softmax(x @ self._weights + self.bias, axis=1)
        return scores

    @cached_property
    def _weights(self) -> FloatArray:
        return self.weights.astype(np.float64)

    def with_power(self, results: Results, rows: Dataset) -> tuple[TokenPrior, Results]:
        """With the power of least log-loss on validation notes, and their results with this prior.

        Args:
            results: the language model's own, with probabilities.
            rows: the split that they belong to.
        """
        assert results.probabilities is not None
        logs = np.log(np.maximum(results.probabilities, np.finfo(np.float64).tiny)), self.of_rows(rows)[results.rows]
        of_model, of_prior = fit_powers(logs, results.label_mask)
        prior = replace(self, power=of_prior / max(of_model, _LEAST_POWER))
        product = power_product(logs, (1.0, prior.power))
        return prior, replace(results, probabilities=product, answer=product.argmax(axis=1))

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ("buckets", "idf", "weights", "bias")}
        save_file(arrays, path, metadata={"power": json.dumps(self.power)})

    @classmethod
    def load(cls, path: Path) -> TokenPrior:
        """Read a file that `save` wrote; a UserError if it is another file."""
        try:
            with safe_open(path, "np") as file:
                arrays = {name: file.get_tensor(name) for name in ("buckets", "idf", "weights", "bias")}
                return cls(**arrays, power=float(json.loads(file.metadata()["power"])))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"model.decoding.prior: {path} is damaged; copy the adapter's folder again.") from error


def span(x: csr_matrix) -> FloatArray:
    """Coordinates of N notes in an orthonormal basis of their span, (N, N) lower triangular.

    The solution of logistic regression lies in the span of the notes, so in this basis it is the same, and a fit with
    few notes, many words and 40 labels takes a second instead of minutes.
    """
    from scipy.linalg import cholesky

    factor: FloatArray = cholesky((x @ x.T).toarray() + 1e-9 * np.eye(x.shape[0]), lower=True)
    return factor


def _tokens(rows: Dataset) -> tuple[IntArray, IntArray]:
    """Tokens of all prompts, one after another, and the note of each."""
    column = rows.with_format("arrow")[:]["input_ids"].combine_chunks()
    lengths = np.diff(column.offsets.to_numpy())
    return column.flatten().to_numpy(), np.repeat(np.arange(len(rows)), lengths)


def _counts(tokens: IntArray, notes: IntArray, n: int) -> csr_matrix:
    """How often each hash of a token or a pair of tokens occurs in each of N notes, (N, 2^18)."""
    from scipy.sparse import csr_matrix

    single, within = tokens.astype(np.uint64) + np.uint64(1), notes[1:] == notes[:-1]
    pairs = (single[:-1] << np.uint64(32)) + single[1:]
    hashes = (np.concatenate([single, pairs[within]]) * _MULTIPLIER) >> np.uint64(64 - _BITS)
    cells = np.concatenate([notes, notes[1:][within]]), hashes.astype(np.int64)
    return csr_matrix((np.ones(len(hashes)), cells), shape=(n, 1 << _BITS))


def _tfidf(counts: csr_matrix, idf: FloatArray) -> csr_matrix:
    """Rows of (1 + log count) x idf with a Euclidean norm of 1, (N, F)."""
    from sklearn.preprocessing import normalize

    weighted = counts.copy()
    weighted.data = (1 + np.log(counts.data)) * idf[counts.indices]
    return normalize(weighted)
