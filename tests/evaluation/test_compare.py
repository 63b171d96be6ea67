"""Comparisons of two systems are paired, and are refused on different notes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_results import make_results, random_results

from medlit.errors import UserError
from medlit.evaluation.compare import compare
from medlit.evaluation.metrics import uncertainty


def test_mcnemar_by_hand() -> None:
    """Nine notes differ, eight to one: 2 (1 + 9) / 2^9."""
    truth = [0] * 20
    a = make_results(truth, [0] * 8 + [1] + [0] * 11)
    b = make_results(truth, [1] * 8 + [0] + [0] * 11)
    found = compare(a, b)
    assert (found.only_a, found.only_b) == (8, 1)
    assert found.mcnemar_p == pytest.approx(20 / 512)
    assert found.accuracy_difference == pytest.approx(7 / 20)
    summary = found.summary("TF-IDF")
    assert summary.startswith("Against TF-IDF: +35.0 points of accuracy, significant (p = 0.039, exact McNemar test: 8")
    assert "8 notes correct only with this system, 1 only with TF-IDF)" in summary


def test_a_system_does_not_differ_from_itself() -> None:
    one = random_results()
    found = compare(one, one)
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
    paired = compare(one, worse)
    width = float(np.diff(uncertainty(one)["f1_macro_ci"])[0])
    assert np.diff(paired.f1_macro_ci)[0] < 0.7 * width
    assert paired.f1_macro_ci[0] > 0
    order = np.random.default_rng(0).permutation(len(worse))
    assert compare(one, worse.select(order)) == paired


def test_different_notes_cannot_be_compared() -> None:
    one = random_results()
    for other in (random_results(seed=1), random_results(n=100), replace(one, names=(*one.names[1:], "other"))):
        with pytest.raises(UserError, match="not tested on the same notes"):
            compare(one, other)
