"""Intervals agree with the literature, scikit-learn and a plain bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from made_results import make_results, random_results
from scipy.stats import binom
from sklearn import metrics as sk

from medlit.evaluation.intervals import Resamples, percentile_interval, wilson
from medlit.evaluation.metrics import uncertainty


def test_wilson_is_newcombe_s_example() -> None:
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I)."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_resampled_scores_are_scikit_learn_s_on_the_same_resample() -> None:
    """With every text in one group the only resample is the notes themselves."""
    one = random_results()
    answer = one.answer.copy()
    answer[:9] = len(one.names)  # invalid
    both = Resamples(one.truth, np.stack([one.answer, answer]), np.zeros(len(one), dtype=int), len(one.names), 3)
    for system, answers in enumerate((one.answer, answer)):
        labels = list(range(len(one.names)))
        macro = sk.f1_score(one.truth, answers, labels=labels, average="macro", zero_division=0)
        assert both.f1_macro[system] == pytest.approx([macro] * 3)
        assert both.observed_f1_macro[system] == pytest.approx(macro)
        assert both.accuracy[system] == pytest.approx([sk.accuracy_score(one.truth, answers)] * 3)


def test_the_bootstrap_is_the_plain_one_over_texts() -> None:
    one = random_results(n=120, k=3)
    fast = Resamples(one.truth, one.answer[None], one.groups, 3)
    draw = np.random.default_rng(1)
    members = [np.flatnonzero(one.groups == group) for group in range(one.groups.max() + 1)]
    slow = []
    for _ in range(2000):
        rows = np.concatenate([members[i] for i in draw.integers(0, len(members), len(members))])
        slow.append(
            (
                (one.answer == one.truth)[rows].mean(),
                sk.f1_score(one.truth[rows], one.answer[rows], average="macro", zero_division=0),
            )
        )
    accuracy, f1 = np.array(slow).T
    assert percentile_interval(fast.accuracy[0]) == pytest.approx(percentile_interval(accuracy), abs=0.012)
    assert percentile_interval(fast.f1_macro[0]) == pytest.approx(percentile_interval(f1), abs=0.012)
    assert fast.f1_macro[0].std() == pytest.approx(f1.std(), rel=0.1)


def test_independent_notes_have_binomial_spread() -> None:
    one = make_results([0] * 60 + [1] * 40, [0] * 100)
    found = uncertainty(one)["accuracy_ci_bootstrap"]
    assert found == pytest.approx(np.array(binom.interval(0.95, 100, 0.6)) / 100, abs=0.011)


def test_copies_of_a_text_do_not_narrow_the_bootstrap_interval() -> None:
    once = make_results([0, 1, 2, 0, 1, 2] * 10, [0, 1, 2, 0, 1, 0] * 10)
    rows = [*range(60)] * 8
    copied = make_results(
        once.truth[rows].tolist(), once.answer[rows].tolist(), texts=[once.text_hashes[row] for row in rows]
    )
    assert uncertainty(copied)["f1_macro_ci"] == pytest.approx(uncertainty(once)["f1_macro_ci"], abs=1e-9)
    narrower = np.diff(uncertainty(copied)["accuracy_ci"]) / np.diff(uncertainty(once)["accuracy_ci"])
    assert narrower < 0.5  # Wilson's interval takes notes as independent


def test_the_interval_contains_the_score_and_is_reproducible() -> None:
    one = random_results()
    found = uncertainty(one)
    low, high = found["f1_macro_ci"]
    assert low < sk.f1_score(one.truth, one.answer, average="macro") < high
    assert uncertainty(one) == found
