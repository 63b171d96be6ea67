"""Two systems on the same notes: is their difference significant?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from medlit.errors import UserError
from medlit.evaluation.intervals import Interval, Resamples, percentile_interval
from medlit.evaluation.results import Results

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Comparison:
    """System A against system B."""

    notes: int  # number of notes that both answered
    only_a: int  # notes that only A answered correctly
    only_b: int  # notes that only B answered correctly
    mcnemar_p: float  # p-value of the exact McNemar test on only_a and only_b
    accuracy_difference: float  # A minus B
    accuracy_ci: Interval  # of that difference, paired bootstrap over texts
    f1_macro_difference: float  # A minus B
    f1_macro_ci: Interval  # of that difference, paired bootstrap over texts

    def summary(self, other: str, this: str = "this system") -> str:
        """The comparison in one sentence; `other` is the title of system B, `this` what to call system A."""
        p, (low, high) = self.mcnemar_p, self.f1_macro_ci
        shown = "< 0.001" if p < 0.001 else f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"
        return (
            f"Against {other}: {100 * self.accuracy_difference:+.1f} points of accuracy, {_verdict(p < SIGNIFICANCE)}"
            f" (p {shown}, exact McNemar test: {self.only_a} notes correct only with {this}, {self.only_b} only with"
            f" {other}); {self.f1_macro_difference:+.3f} macro F1,"
            f" {_verdict(low > 0 or high < 0)} (95% CI {low:+.3f} to {high:+.3f}, paired bootstrap over texts)."
        )


def _verdict(significant: bool) -> str:
    return "significant" if significant else "not significant"


def compare(a: Results, b: Results) -> Comparison:
    """Compare two systems' results on the same notes.

    Raises:
        UserError: the notes, their texts or their labels differ.
    """
    aligned = _align(a, b)
    if aligned is None:
        raise UserError(
            "run_dir: the two systems were not tested on the same notes with the same labels; give both the same data"
            " settings and test again."
        )
    only_a, only_b = int((a.correct & ~aligned.correct).sum()), int((aligned.correct & ~a.correct).sum())
    resamples = Resamples(a.truth, np.stack([a.answer, aligned.answer]), a.groups, len(a.names))
    f1 = resamples.observed_f1_macro
    return Comparison(
        notes=len(a),
        only_a=only_a,
        only_b=only_b,
        mcnemar_p=float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0,
        accuracy_difference=float(a.correct.mean() - aligned.correct.mean()),
        accuracy_ci=percentile_interval(resamples.accuracy[0] - resamples.accuracy[1]),
        f1_macro_difference=float(f1[0] - f1[1]),
        f1_macro_ci=percentile_interval(resamples.f1_macro[0] - resamples.f1_macro[1]),
    )


def same_notes(a: Results, b: Results) -> bool:
    """Whether two results are of the same notes, in any order, with the same labels."""
    return _align(a, b) is not None


def _align(a: Results, b: Results) -> Results | None:
    """B in the order of A's notes; None if notes, texts or labels differ."""
    if a.names != b.names or sorted(a.ids) != sorted(b.ids):
        return None
    position = {note: i for i, note in enumerate(b.ids)}
    aligned = b.select(np.array([position[note] for note in a.ids], dtype=np.int64))
    same = np.array_equal(a.truth, aligned.truth) and a.text_hashes == aligned.text_hashes
    return aligned if same else None
