"""A TF-IDF prior: ridge regression from the tokens of a note to its labels, fitted in seconds.

The language model reads a note and the prior counts its words, so they err on different notes. Their probabilities are
multiplied, the prior's to a power that the validation notes choose (a product of experts, Hinton 2002).

A token counts in the whole note and again among its first ones, where many notes name what was done. Tokens of a single
note are left out, so that the file holds no text, only the ids of tokens that several notes share.

N notes, K labels, F features.
"""

import json
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix
from scipy.special import log_softmax

from medlit.data.collate import Prompts
from medlit.data.labels import LabelSet
from medlit.data.notes import specialties_of
from medlit.errors import UserError
from medlit.evaluation.calibration import fit_powers, log_probabilities, power_product
from medlit.evaluation.results import FloatArray, IntArray, Results

PRIOR_FILE = "prior.safetensors"
_FIRST = 30  # tokens of a note
_PENALTY = 0.3  # of ridge regression, for notes of norm 1
_SHARPNESS = 10.0  # of its scores, which are shares of labels, as logits
_MOST_NOTES = 20_000
MOST_WEIGHTS = 4_000_000  # with many labels
_UNSEEN = -14.0  # score of a label without a training note: about one in a million
_LEAST_POWER = 0.05  # of the language model


@dataclass(frozen=True)
class TokenPrior:
    """Log-probabilities of the K labels from a prompt's tokens."""

    start: int  # tokens before a note, which are the instruction's
    features: IntArray  # ids of tokens, ascending; negative (~id) among the first of a note, (F,)
    idf: FloatArray  # inverse document frequency of each feature, (F,)
    weights: FloatArray  # (F, K)
    bias: FloatArray  # (K,)
    power: float = 1.0  # of its probabilities, where the language model's have 1

    @classmethod
    def fit(cls, rows: Dataset, label_set: LabelSet) -> Self | None:
        """Fit it to tokenised training notes, at most 20,000; None if they have one label or no feature in common."""
        from sklearn.linear_model import Ridge

        if len(rows) > _MOST_NOTES:
            rows = rows.select(np.sort(np.random.default_rng(0).permutation(len(rows))[:_MOST_NOTES]))
        n, (tokens, notes) = len(rows), _tokens(rows)
        begin, most = np.searchsorted(notes, np.arange(n)), int(np.bincount(notes).min()) - 1
        start = next((i for i in range(most) if (tokens[begin + i] != tokens[i]).any()), most)
        found = _occurrences(tokens, notes, start)
        features = np.unique(found[0])
        counts = _counts(features, *found, n)
        ends = np.append(begin[1:], len(tokens))
        texts = [*{tokens[a:b].tobytes(): i for i, (a, b) in enumerate(zip(begin, ends, strict=True))}.values()]
        frequency = counts[texts].getnnz(axis=0)  # texts that have each
        common = np.flatnonzero((frequency > 1) & (frequency < len(texts)))
        common = np.sort(common[np.argsort(-frequency[common], kind="stable")[: MOST_WEIGHTS // len(label_set)]])
        shares = np.zeros((n, len(label_set)))
        shares[examples_of(rows, label_set)] = 1
        shares /= shares.sum(axis=1, keepdims=True)
        seen = shares.any(axis=0)
        if seen.sum() < 2 or not len(common):
            return None
        features, idf = features[common], np.log((1 + len(texts)) / (1 + frequency[common])) + 1
        balanced = (shares[:, seen] / shares[:, seen].mean(axis=0)).mean(axis=1)  # labels have equal weight
        ridge = Ridge(_PENALTY, solver="sparse_cg", tol=1e-3)
        ridge.fit(_tfidf(counts[:, common], idf), shares, sample_weight=balanced)
        weights = np.ascontiguousarray(_SHARPNESS * ridge.coef_.T, dtype=np.float16)  # for `save`
        bias = np.where(seen, _SHARPNESS * ridge.intercept_, _UNSEEN)
        return cls(start, features, idf, weights.astype(np.float64), bias)

    def of_rows(self, rows: Dataset) -> FloatArray:
        """Log-probabilities of tokenised notes, (N, K)."""
        return self._log_probabilities(*_tokens(rows), len(rows))

    def of_prompts(self, prompts: Prompts) -> FloatArray:
        """Log-probabilities of B prompts, (B, K)."""
        mask = prompts.attention_mask.cpu().numpy() > 0
        return self._log_probabilities(prompts.input_ids.cpu().numpy()[mask], mask.nonzero()[0], len(mask))

    def _log_probabilities(self, tokens: IntArray, notes: IntArray, n: int) -> FloatArray:
        x = _tfidf(_counts(self.features, *_occurrences(tokens, notes, self.start), n), self.idf)
        return np.asarray(log_softmax(x @ self.weights + self.bias, axis=1))

    def with_power(self, results: Results, of_split: FloatArray) -> tuple[Self, Results]:
        """This prior with the power that fits the validation notes best, and the notes' results with it.

        `results` are the language model's own, with probabilities; `of_split` is `of_rows` of the whole split.
        """
        assert results.probabilities is not None
        logs = log_probabilities(results.probabilities), of_split[results.rows]
        of_model, of_prior = fit_powers(logs, results.label_mask)
        prior = replace(self, power=of_prior / max(of_model, _LEAST_POWER))
        product = power_product(logs, (1.0, prior.power))
        return prior, replace(results, probabilities=product, answer=product.argmax(axis=1))

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        arrays = {name: getattr(self, name) for name in ("features", "idf", "bias")}
        arrays["weights"] = self.weights.astype(np.float16)
        save_file(arrays, path, metadata={"start, power": json.dumps([self.start, self.power])})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that `save` wrote; a UserError if it is another file."""
        try:
            with safe_open(path, "np") as file:
                arrays = {name: file.get_tensor(name) for name in ("features", "idf", "weights", "bias")}
                arrays["weights"] = arrays["weights"].astype(np.float64)
                start, power = json.loads(file.metadata()["start, power"])
                return cls(start, **arrays, power=power)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"model.decoding.prior: {path} is damaged or outdated; copy it again, or fit again."
            ) from error


def examples_of(rows: Dataset, label_set: LabelSet) -> tuple[IntArray, IntArray]:
    """Note and label id of each example, (E,): a note with several labels stands once for each."""
    own = specialties_of(rows)
    known = {name: label_set.index(name) for name in set(chain.from_iterable(own))}
    pairs = [(note, known[name]) for note, names in enumerate(own) for name in names]
    notes, labels = np.array(pairs, dtype=np.int64).T
    return notes, labels


def _tokens(rows: Dataset) -> tuple[IntArray, IntArray]:
    """Tokens of all prompts, one after another, and the note of each."""
    column = rows.with_format("arrow")[:]["input_ids"].combine_chunks()
    return column.flatten().to_numpy(), np.repeat(np.arange(len(rows)), np.diff(column.offsets.to_numpy()))


def _occurrences(tokens: IntArray, notes: IntArray, start: int) -> tuple[IntArray, IntArray]:
    """The feature of each token after the instruction, also of each of a note's first, and its note."""
    place = np.arange(len(notes)) - np.searchsorted(notes, notes) - start
    after, first = place >= 0, (place >= 0) & (place < _FIRST)
    features = np.concatenate([tokens[after], ~tokens[first].astype(np.int64)])
    return features, np.concatenate([notes[after], notes[first]])


def _counts(features: IntArray, found: IntArray, notes: IntArray, n: int) -> csr_matrix:
    """How often each feature is found in each of N notes, (N, F)."""
    column = np.minimum(np.searchsorted(features, found), len(features) - 1)
    known = features[column] == found
    return csr_matrix((np.ones(known.sum()), (notes[known], column[known])), shape=(n, len(features)))


def _tfidf(counts: csr_matrix, idf: FloatArray) -> csr_matrix:
    """Rows of (1 + log count) x idf with a Euclidean norm of 1, (N, F)."""
    from sklearn.preprocessing import normalize

    values = (1 + np.log(counts.data)) * idf[counts.indices]
    return normalize(csr_matrix((values, counts.indices, counts.indptr), counts.shape))
