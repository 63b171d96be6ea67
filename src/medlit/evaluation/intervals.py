"""Confidence intervals: Wilson's, and a bootstrap over texts instead of rows.

Notes with the same text get the same answer, so they are one observation and are drawn together. A resample draws as
many texts as there are, with replacement. A text enters the scores as its counts of (truth, answer) cells, and texts
with equal counts are exchangeable: drawing the number of each kind from one multinomial distribution is the same
bootstrap, and 10,000 resamples of a million notes cost as little as those of a hundred.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from scipy.stats import binomtest

from medlit.evaluation.results import FloatArray, IntArray

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 3407
_CHUNK = 500  # resamples drawn at a time, to bound the memory
Interval = tuple[float, float]


def wilson(correct: int, n: int) -> Interval:
    """95 % interval of a share (Wilson 1927) of n independent notes; (0, 1) of none."""
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(correct, n).proportion_ci(confidence_level=LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def percentile_interval(values: FloatArray) -> Interval:
    """Percentile interval of 95 % of the resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


class Resamples:
    """Resampled counts of several systems' answers to the same notes.

    Args:
        truth: label ids, (N,).
        answers: label ids of each system, (S, N).
        groups: number of each note's text, (N,).
        k: number of labels.
        resamples: R, number of draws.
    """

    def __init__(
        self, truth: IntArray, answers: IntArray, groups: IntArray, k: int, resamples: int = RESAMPLES
    ) -> None:
        self.k = k
        # Cells, (1 + S, C): the combinations of true label and the systems' answers that occur.
        self._cells, cell = np.unique(np.stack([truth, *answers]), axis=1, return_inverse=True)
        kinds = _kinds(groups, cell.reshape(-1))
        texts = np.array(list(kinds.values()))
        cells_of_kind = np.zeros((len(kinds), self._cells.shape[1]))
        for i, kind in enumerate(kinds):
            np.add.at(cells_of_kind[i], list(kind), 1)
        self._observed = np.bincount(cell.reshape(-1)).astype(np.float64)[None]  # (1, C), notes in each cell
        generator = np.random.default_rng(SEED)
        draws = [
            generator.multinomial(texts.sum(), texts / texts.sum(), size=min(_CHUNK, resamples - start)) @ cells_of_kind
            for start in range(0, resamples, _CHUNK)
        ]
        self._counts = np.concatenate(draws)  # (R, C), the same in each resample

    @property
    def accuracy(self) -> FloatArray:
        """Share of correct answers, (S, R)."""
        correct = self._cells[1:] == self._cells[0]  # (S, C)
        share: FloatArray = (self._counts @ correct.T / self._counts.sum(axis=1, keepdims=True)).T
        return share

    @property
    def f1_macro(self) -> FloatArray:
        """Mean F1 of the classes that occur in the resample, in truth or in answers, (S, R)."""
        return np.stack([self._f1(answers, self._counts) for answers in self._cells[1:]])

    @property
    def observed_f1_macro(self) -> FloatArray:
        """The same for the notes themselves, (S,)."""
        return np.concatenate([self._f1(answers, self._observed) for answers in self._cells[1:]])

    def _f1(self, answers: IntArray, counts: FloatArray) -> FloatArray:
        true, answered = self._one_hot(self._cells[0]), self._one_hot(answers)
        hits = counts @ (answered * true)  # (R, K)
        total = counts @ true + counts @ answered
        f1 = 2 * hits / np.maximum(total, 1)
        mean: FloatArray = f1.sum(axis=1) / np.maximum((total > 0).sum(axis=1), 1)
        return mean

    def _one_hot(self, labels: IntArray) -> FloatArray:
        # Label id K, an invalid answer, has no column.
        one_hot: FloatArray = (labels[:, None] == np.arange(self.k)).astype(np.float64)  # (C, K)
        return one_hot


def _kinds(groups: IntArray, cell: IntArray) -> Counter[tuple[int, ...]]:
    """Count the groups that hold exactly the same cells."""
    order = np.lexsort((cell, groups))
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    return Counter(tuple(part.tolist()) for part in np.split(cell[order], starts))
