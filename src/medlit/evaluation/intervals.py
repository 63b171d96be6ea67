"""How far a score could be off: Wilson's interval, and a bootstrap that draws texts instead of rows.

Notes that are the same text are answered alike, so they are one observation and move together. A resample draws as many
texts as there are, with replacement. What a text adds to the scores is the counts of its (truth, answer) cells, and
texts that add the same are exchangeable: drawing the number of each kind from one multinomial distribution is the same
bootstrap, and 10,000 resamples of a million notes cost as little as those of a hundred.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from medlit.evaluation.results import FloatArray, IntArray

RESAMPLES = 10_000
LEVEL = 0.95
SEED = 3407
_AT_ONCE = 500  # resamples in memory before they are summed up
Interval = tuple[float, float]


def wilson(right: int, n: int) -> Interval:
    """95 % interval of a share (Wilson 1927): right answers of n, each note by itself; (0, 1) of none."""
    if n == 0:
        return 0.0, 1.0
    found = binomtest(right, n).proportion_ci(confidence_level=LEVEL, method="wilson")
    return float(found.low), float(found.high)


class Resamples:
    """Resampled counts of several systems' answers to the same notes.

    Args:
        truth: label ids, (N,).
        answers: label ids of each system, (S, N).
        groups: number of each note's text, (N,).
        k: labels.
        resamples: R, how often to draw.
        seed: of the draw.
    """

    def __init__(
        self,
        truth: IntArray,
        answers: IntArray,
        groups: IntArray,
        k: int,
        resamples: int = RESAMPLES,
        seed: int = SEED,
    ) -> None:
        self.k = k
        cells, cell = np.unique(np.stack([truth, *answers]), axis=1, return_inverse=True)
        self._cells = cells  # (1 + S, C): truth and the systems' answers of each combination that occurs
        kinds = _kinds(groups, cell.reshape(-1))
        times = np.array(list(kinds.values()))
        content = np.zeros((len(kinds), cells.shape[1]))
        for i, kind in enumerate(kinds):
            np.add.at(content[i], list(kind), 1)
        self._observed = np.bincount(cell.reshape(-1)).astype(np.float64)[None]  # (1, C): notes of each combination
        generator = np.random.default_rng(seed)
        draws = [
            generator.multinomial(times.sum(), times / times.sum(), size=min(_AT_ONCE, resamples - start)) @ content
            for start in range(0, resamples, _AT_ONCE)
        ]
        self._counts = np.concatenate(draws)  # (R, C): the same, resampled

    @property
    def accuracy(self) -> FloatArray:
        """Share of notes answered rightly, (S, R)."""
        right = self._cells[1:] == self._cells[0]  # (S, C)
        share: FloatArray = (self._counts @ right.T / self._counts.sum(axis=1, keepdims=True)).T
        return share

    @property
    def f1_macro(self) -> FloatArray:
        """Mean F1 of the classes that occur in the resample, in truth or in answers, (S, R)."""
        return np.stack([self._f1(answers, self._counts) for answers in self._cells[1:]])

    @property
    def observed_f1_macro(self) -> FloatArray:
        """The same of the notes as they are, (S,)."""
        return np.concatenate([self._f1(answers, self._observed) for answers in self._cells[1:]])

    def _f1(self, answers: IntArray, counts: FloatArray) -> FloatArray:
        truth, answered = self._one_hot(self._cells[0]), self._one_hot(answers)
        hit = counts @ (answered * truth)  # (R, K)
        both = counts @ truth + counts @ answered
        f1 = 2 * hit / np.maximum(both, 1)
        mean: FloatArray = f1.sum(axis=1) / np.maximum((both > 0).sum(axis=1), 1)
        return mean

    def _one_hot(self, labels: IntArray) -> FloatArray:
        # Label id K is off the list and has no column.
        one_hot: FloatArray = (labels[:, None] == np.arange(self.k)).astype(np.float64)  # (C, K)
        return one_hot


def _kinds(groups: IntArray, cell: IntArray) -> Counter[tuple[int, ...]]:
    """How many groups hold exactly these cells."""
    order = np.lexsort((cell, groups))
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    return Counter(tuple(part.tolist()) for part in np.split(cell[order], starts))


def interval(values: npt.NDArray[np.float64]) -> Interval:
    """Percentile interval that holds 95 % of the resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
