"""Confidence intervals, Wilson's and a bootstrap over texts instead of rows; and whether two systems differ.

Notes with the same text get the same answer, so they are one observation and are drawn together. A resample draws as
many texts as there are, with replacement. A text enters the scores as its counts of (truth, answer) cells, and texts
with equal counts are exchangeable: drawing the number of each kind from one multinomial distribution is the same
bootstrap, and 10,000 resamples of a million notes cost as little as those of a hundred.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.stats import binomtest

from medlit.errors import UserError
from medlit.evaluation.results import BoolArray, FloatArray, IntArray, Results

RESAMPLES = 10_000
LEVEL = 0.95
SIGNIFICANCE = 0.05
SEED = 3407
_CHUNK, _NUMBERS = 500, 2_000_000  # resamples drawn at a time, and numbers of their largest table, to bound the memory
Interval = tuple[float, float]


def wilson(correct: int, n: int) -> Interval:
    """95 % interval of a share (Wilson 1927) of n independent notes; (0, 1) of none."""
    if n == 0:
        return 0.0, 1.0
    # The share itself as null hypothesis spares the search for a p-value, most of the time.
    interval = binomtest(correct, n, correct / n).proportion_ci(confidence_level=LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def percentile_interval(values: FloatArray) -> Interval:
    """Percentile interval of 95 % of the resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


class Resamples:
    """Resampled counts of S systems' `answers`, (S, N), to the same notes, (N,); `groups` are their texts, k labels."""

    def __init__(
        self, truth: IntArray, answers: IntArray, groups: IntArray, k: int, resamples: int = RESAMPLES
    ) -> None:
        # Cells, (1 + S, C): the combinations of true label and the systems' answers that occur. A cell has one label of
        # each system and a kind few cells, so both tables are sparse, or many labels would fill the memory.
        cells, cell = np.unique(np.stack([truth, *answers]), axis=1, return_inverse=True)
        order = np.lexsort((cell, groups))
        starts = np.flatnonzero(np.diff(groups[order])) + 1
        # Kinds: the groups that hold exactly the same cells, and their number.
        kinds = Counter(tuple(part.tolist()) for part in np.split(cell[order], starts))
        texts = np.array(list(kinds.values()))
        cells_of_kind = _sparse(np.concatenate(list(kinds)), [len(kind) for kind in kinds], cells.shape[1])
        # Label id K, an invalid answer, has no column.
        self._one_hot = [_sparse(labels, [1] * len(labels), k + 1)[:, :k] for labels in cells]  # (C, K) each
        self._correct = cells[1:] == cells[0]  # (S, C)
        observed = np.bincount(cell).astype(np.float64)[None]  # (1, C), notes in each cell
        self.observed_f1_macro = self._scores(observed)[1][:, 0]  # of the notes themselves, (S,)
        generator = np.random.default_rng(SEED)
        chunk = max(1, min(_CHUNK, _NUMBERS // max(len(kinds), cells.shape[1], k)))
        scores = [
            self._scores(generator.multinomial(texts.sum(), texts / texts.sum(), size=size) @ cells_of_kind)
            for size in (min(chunk, resamples - start) for start in range(0, resamples, chunk))
        ]
        self.accuracy: FloatArray = np.concatenate([each[0] for each in scores], axis=1)  # share correct, (S, R)
        # Mean F1 of the classes that occur in the resample, in truth or in answers, (S, R).
        self.f1_macro: FloatArray = np.concatenate([each[1] for each in scores], axis=1)

    def _scores(self, counts: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Accuracy and macro F1 of each system, (S, r), from the notes in each cell of r resamples, (r, C)."""
        accuracy = (counts @ self._correct.T / counts.sum(axis=1, keepdims=True)).T
        true, *answered = self._one_hot
        notes = counts @ true  # (r, K)
        f1 = []
        for correct, of_system in zip(self._correct, answered, strict=True):
            hits, total = counts[:, correct] @ true[correct], notes + counts @ of_system
            f1.append((2 * hits / np.maximum(total, 1)).sum(axis=1) / np.maximum((total > 0).sum(axis=1), 1))
        return accuracy, np.stack(f1)


def _sparse(columns: IntArray, of_row: Sequence[int], width: int) -> csr_array:
    """A matrix of ones at these columns, row after row."""
    return csr_array((np.ones(len(columns)), columns, np.cumsum([0, *of_row])), shape=(len(of_row), width))


@dataclass(frozen=True)
class Comparison:
    """System A against system B."""

    notes: int  # number of notes that both answered
    only_a: int  # notes that only A answered correctly
    only_b: int  # notes that only B answered correctly
    mcnemar_p: float  # p-value of the exact McNemar test on texts
    accuracy_difference: float  # A minus B
    f1_macro_difference: float  # A minus B
    f1_macro_ci: Interval  # of that difference, paired bootstrap over texts
    any_of: tuple[int, int, float] | None = None  # as the first three where notes have several labels, any being right
    copies: bool = False  # whether notes share a text

    def summary(self, other: str, this: str = "this system") -> str:
        """The comparison in one sentence; `other` is the title of system B, `this` what to call system A."""
        low, high = self.f1_macro_ci
        verdict = {True: "significant", False: "not significant"}

        def share(name: str, only_a: int, only_b: int, p: float) -> str:
            shown = "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"
            return (
                f"{100 * (only_a - only_b) / self.notes:+.1f} points of {name}, {verdict[p < SIGNIFICANCE]} (p {shown},"
                f" exact McNemar test{' over texts' * self.copies}: {only_a} notes correct only with {this},"
                f" {only_b} only with {other})"
            )

        any_of = "" if self.any_of is None else f"{share('any-of accuracy', *self.any_of)}; "
        strict = share("accuracy", self.only_a, self.only_b, self.mcnemar_p)
        return (
            f"Against {other}: {any_of}{strict}; {self.f1_macro_difference:+.3f} macro F1,"
            f" {verdict[low > 0 or high < 0]} (95% CI {low:+.3f} to {high:+.3f}, paired bootstrap over texts)."
        )


def compare_systems(a: Results, b: Results) -> Comparison:
    """Compare two systems' results; a UserError if notes, texts or labels differ."""
    aligned = align(a, b)
    if aligned is None:
        fault = "the two systems were not tested on the same notes with the same labels"
        raise UserError(f"run_dir: {fault}; give both the same data settings and test again.")
    only_a, only_b, p = _mcnemar(a.correct, aligned.correct, a.groups)
    resamples = Resamples(a.truth, np.stack([a.answer, aligned.answer]), a.groups, len(a.names))
    f1 = resamples.observed_f1_macro
    return Comparison(
        notes=len(a),
        only_a=only_a,
        only_b=only_b,
        mcnemar_p=p,
        accuracy_difference=float(a.correct.mean() - aligned.correct.mean()),
        f1_macro_difference=float(f1[0] - f1[1]),
        f1_macro_ci=percentile_interval(resamples.f1_macro[0] - resamples.f1_macro[1]),
        any_of=_mcnemar(a.any_of, aligned.any_of, a.groups) if any(len(own) > 1 for own in a.accepted) else None,
        copies=len({*a.text_hashes}) < len(a),
    )


def _mcnemar(a: BoolArray, b: BoolArray, texts: IntArray) -> tuple[int, int, float]:
    """Notes that only A and only B has right, and p of the exact test over texts, each for who has more right."""
    ahead = np.sign(np.bincount(texts, a.astype(int) - b))
    p = binomtest(int((ahead > 0).sum()), np.count_nonzero(ahead)).pvalue if ahead.any() else 1.0
    return int((a & ~b).sum()), int((b & ~a).sum()), float(p)


def align(a: Results, b: Results) -> Results | None:
    """B in the order of A's notes; None if notes, texts or labels differ."""
    if a.names != b.names or sorted(a.ids) != sorted(b.ids):
        return None
    position = {note: i for i, note in enumerate(b.ids)}
    aligned = b.select(np.array([position[note] for note in a.ids], dtype=np.int64))
    return aligned if np.array_equal(a.truth, aligned.truth) and a.text_hashes == aligned.text_hashes else None
