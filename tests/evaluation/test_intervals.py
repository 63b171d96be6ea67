"""Intervals agree with the literature, scikit-learn and a plain bootstrap; comparisons are paired."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_results import make_results, random_results
from scipy.stats import binom
from sklearn import metrics as sk

from medlit.errors import UserError
from medlit.evaluation.intervals import Resamples, compare_systems, percentile_interval, wilson
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
    for i in range(2000):
        rows = np.concatenate([members[i] for i in draw.integers(0, len(members), len(members))])
        confusion = np.zeros((3, 3))
        np.add.at(confusion, (one.truth[rows], one.answer[rows]), 1)
        right, occur = confusion.diagonal(), confusion.sum(axis=0) + confusion.sum(axis=1)
        slow.append((right.sum() / len(rows), (2 * right[occur > 0] / occur[occur > 0]).mean()))
        if i < 50:  # scikit-learn's takes thirty times as long
            f1 = sk.f1_score(one.truth[rows], one.answer[rows], average="macro", zero_division=0)
            assert slow[-1][1] == pytest.approx(f1)
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


def test_mcnemar_by_hand() -> None:
    """Nine notes differ, eight to one: 2 (1 + 9) / 2^9."""
    truth = [0] * 20
    a = make_results(truth, [0] * 8 + [1] + [0] * 11)
    b = make_results(truth, [1] * 8 + [0] + [0] * 11)
    found = compare_systems(a, b)
    assert (found.only_a, found.only_b) == (8, 1)
    assert found.mcnemar_p == pytest.approx(20 / 512)
    assert found.accuracy_difference == pytest.approx(7 / 20)
    summary = found.summary("TF-IDF")
    assert summary.startswith("Against TF-IDF: +35.0 points of accuracy, significant (p = 0.039, exact McNemar test: 8")
    assert "8 notes correct only with this system, 1 only with TF-IDF)" in summary


def test_copies_of_a_text_do_not_lower_the_p_value() -> None:
    """Six copies of one text for A, one text for B, and one with a copy for each: no evidence of a difference."""
    texts = [*["one"] * 6, "two", "three", "three"]
    a = make_results([0] * 9, [0] * 6 + [1, 0, 1], texts=texts)
    b = make_results([0] * 9, [1] * 6 + [0, 1, 0], texts=texts)
    found = compare_systems(a, b)
    assert (found.only_a, found.only_b, found.mcnemar_p) == (7, 2, 1)
    assert "not significant (p = 1.00, exact McNemar test over texts: 7 notes correct" in found.summary("B")
    twice = [*range(5)] * 2
    a, b = (make_results([0] * 10, [answer] * 10, texts=[str(text) for text in twice]) for answer in (0, 1))
    assert compare_systems(a, b).mcnemar_p == pytest.approx(2 / 2**5)


def test_the_any_of_accuracy_is_compared_where_a_note_has_several_labels() -> None:
    """Four notes differ, all in favour of A: 2 / 2^4."""
    accepted = [[0, 1]] * 4 + [[0]] * 16
    a = replace(make_results([0] * 20, [1] * 4 + [0] * 16), accepted=accepted)
    b = replace(make_results([0] * 20, [2] * 4 + [0] * 16), accepted=accepted)
    found = compare_systems(a, b)
    assert (found.only_a, found.only_b, found.mcnemar_p) == (0, 0, 1)
    assert found.any_of == (4, 0, pytest.approx(2 / 16))
    assert found.summary("it").startswith(
        "Against it: +20.0 points of any-of accuracy, not significant (p = 0.12, exact"
    )
    assert "only with it); +0.0 points of accuracy, not significant (p = 1.00" in found.summary("it")
    assert compare_systems(make_results([0], [0]), make_results([0], [1])).any_of is None


def test_a_system_does_not_differ_from_itself() -> None:
    one = random_results()
    found = compare_systems(one, one)
    assert found.mcnemar_p == 1
    assert found.f1_macro_ci == (0, 0)
    assert found.summary("itself").count("not significant (") == 2
    assert "p = 1.00," in found.summary("itself")


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    """Two systems that err on the same notes differ by little, however uncertain each score is."""
    one = random_results(n=300)
    answer = one.answer.copy()
    wrong = np.flatnonzero(one.correct)[:12]
    answer[wrong] = (answer[wrong] + 1) % len(one.names)
    worse = replace(one, answer=answer, probabilities=None)
    paired = compare_systems(one, worse)
    width = float(np.diff(uncertainty(one)["f1_macro_ci"])[0])
    assert np.diff(paired.f1_macro_ci)[0] < 0.7 * width
    assert paired.f1_macro_ci[0] > 0
    order = np.random.default_rng(0).permutation(len(worse))
    assert compare_systems(one, worse.select(order)) == paired


def test_different_notes_cannot_be_compared() -> None:
    one = random_results()
    for other in (random_results(seed=1), random_results(n=100), replace(one, names=(*one.names[1:], "other"))):
        with pytest.raises(UserError, match="not tested on the same notes"):
            compare_systems(one, other)
