"""Two systems on the same notes: can their difference be told from chance?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from medlit.errors import UserError
from medlit.evaluation.intervals import Interval, Resamples, interval
from medlit.evaluation.results import Results

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Comparison:
    """System A against system B.

    Attributes:
        notes: answered by both.
        only_a: notes that A alone answered rightly.
        only_b: notes that B alone answered rightly.
        mcnemar_p: exact McNemar test: how often chance alone would part only_a and only_b so far or farther.
        accuracy_difference: A less B.
        accuracy_ci: of that difference, paired bootstrap over texts.
        f1_macro_difference: A less B.
        f1_macro_ci: of that difference, paired bootstrap over texts.
    """

    notes: int
    only_a: int
    only_b: int
    mcnemar_p: float
    accuracy_difference: float
    accuracy_ci: Interval
    f1_macro_difference: float
    f1_macro_ci: Interval

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def words(self, other: str) -> str:
        """The comparison in one sentence.

        Args:
            other: what to call system B.
        """
        accuracy = _told(self.mcnemar_p < SIGNIFICANCE)
        low, high = self.f1_macro_ci
        f1 = _told(low > 0 or high < 0)
        return (
            f"Against {other}: {100 * self.accuracy_difference:+.1f} points of accuracy ({self.only_a} notes that it"
            f" alone got right, {self.only_b} that only the other did; exact McNemar test, p {_p(self.mcnemar_p)}),"
            f" {accuracy}; {self.f1_macro_difference:+.3f} macro F1 (95 % {low:+.3f} to {high:+.3f}, paired bootstrap"
            f" over texts), {f1}."
        )


def _told(significant: bool) -> str:
    return f"which {'can' if significant else 'cannot'} be told from chance"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def compare(a: Results, b: Results) -> Comparison:
    """Compare two records of the same notes.

    Raises:
        UserError: the notes, their texts or their labels are not the same.
    """
    if not same_notes(a, b):
        raise UserError(
            "run: the two systems were not tested on the same notes with the same labels; give both the same data"
            " settings and test again."
        )
    order = _order(a, b)
    right_a, right_b = a.correct, b.correct[order]
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    drawn = Resamples(a.truth, np.stack([a.answer, b.answer[order]]), a.groups, len(a.names))
    f1 = drawn.observed_f1_macro
    return Comparison(
        notes=len(a),
        only_a=only_a,
        only_b=only_b,
        mcnemar_p=float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0,
        accuracy_difference=float(right_a.mean() - right_b.mean()),
        accuracy_ci=interval(drawn.accuracy[0] - drawn.accuracy[1]),
        f1_macro_difference=float(f1[0] - f1[1]),
        f1_macro_ci=interval(drawn.f1_macro[0] - drawn.f1_macro[1]),
    )


def same_notes(a: Results, b: Results) -> bool:
    """Whether two records are of the same notes, in whatever order, with the same labels."""
    if a.names != b.names or sorted(a.ids) != sorted(b.ids):
        return False
    order = _order(a, b)
    return np.array_equal(a.truth, b.truth[order]) and a.text_hashes == [b.text_hashes[i] for i in order]


def _order(a: Results, b: Results) -> np.ndarray:
    """Where each of A's notes stands in B."""
    place = {note: i for i, note in enumerate(b.ids)}
    return np.array([place[note] for note in a.ids], dtype=np.int64)
