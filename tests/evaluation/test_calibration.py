"""Reliability, temperature, and risk and coverage agree with scikit-learn and with hand calculation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_results import make_results, random_results
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, top_k_accuracy_score

from medlit.evaluation import calibration
from medlit.evaluation.metrics import uncertainty


def test_reliability_has_the_bins_of_scikit_learn() -> None:
    one = random_results(n=200)
    confidence = one.confidence
    assert confidence is not None
    bins = calibration.reliability(confidence, one.correct, bins=8)
    accuracy, mean = calibration_curve(one.correct, confidence, n_bins=8, strategy="quantile")
    assert bins.notes.tolist() == [25] * 8
    assert bins.accuracy == pytest.approx(accuracy)
    assert bins.confidence == pytest.approx(mean)


def test_calibration_error_by_hand() -> None:
    """Bins (0.5, 0.6: one of two right) and (0.8, 0.9: both right): (|0.55 - 0.5| + |0.85 - 1|) / 2."""
    confidence, correct = np.array([0.9, 0.5, 0.8, 0.6]), np.array([True, False, True, True])
    assert calibration.reliability(confidence, correct, bins=2).error == pytest.approx(0.1)


def test_the_calibration_error_of_equal_confidence_does_not_depend_on_the_order() -> None:
    """As of a baseline that answers each note alike; bins of a table sorted by label had an error of 0.32."""
    assert calibration.reliability(np.full(100, 0.2), np.arange(100) < 20).error == pytest.approx(0, abs=1e-12)


def test_the_log_loss_of_a_zero_probability_is_finite() -> None:
    assert 30 < calibration.log_loss(np.array([[1.0, 0.0]]), np.array([1])) < 40


@pytest.mark.parametrize("t", [0.5, 1.0, 3.0])
def test_a_known_temperature_is_recovered(t: float) -> None:
    """Truth drawn from the probabilities is calibrated; the fit must undo the sharpening."""
    draw = np.random.default_rng(0)
    calibrated = draw.dirichlet(np.ones(4), size=4000)
    truth = np.array([draw.choice(4, p=p) for p in calibrated])
    sharpened = calibration.at_temperature(calibrated, 1 / t)
    found = calibration.fit_temperature(sharpened, truth)
    assert found == pytest.approx(t, rel=0.06)
    rescaled = calibration.at_temperature(sharpened, found)
    assert calibration.log_loss(rescaled, truth) <= calibration.log_loss(sharpened, truth) + 1e-9
    assert np.array_equal(rescaled.argmax(axis=1), sharpened.argmax(axis=1))


def test_an_error_costs_more_the_lower_the_temperature() -> None:
    """One answer of a hundred is certain and wrong, the others are right and doubtful."""
    p, truth = np.tile([0.6, 0.4], (100, 1)), np.zeros(100, dtype=np.int64)
    p[0], truth[0] = [1 - 1e-30, 1e-30], 1
    assert calibration.fit_temperature(p, truth) > 10


@settings(deadline=None)
@given(st.lists(st.floats(-600, 0), min_size=2, max_size=5), st.floats(0.05, 400))
def test_a_temperature_divides_scores_of_any_size(scores: list[float], temperature: float) -> None:
    p = softmax([scores], axis=1)
    assert calibration.at_temperature(p, temperature) == pytest.approx(
        softmax(np.array([scores]) / temperature, axis=1)
    )


def test_answers_without_an_error_fit_no_temperature() -> None:
    """Six notes, all answered right, had made a guess of 87 % one of 100 %."""
    p = np.full((6, 4), 0.1) + 0.6 * np.eye(6, 4) + 0.6 * np.eye(6, 4, -4)
    truth = p.argmax(axis=1)
    assert calibration.fit_temperature(p, truth) == 1.0
    assert calibration.fit_temperature(p, truth, power=25.6) == 25.6, "a prior's power grows as far"
    truth[0] = 3
    assert calibration.fit_temperature(p, truth) > 0.1


def test_proper_scores_are_those_of_scikit_learn_and_of_the_definition() -> None:
    one = random_results(n=200)
    p, truth = one.probabilities, one.truth
    assert p is not None
    assert calibration.log_loss(p, truth) == pytest.approx(log_loss(truth, p))
    assert calibration.brier(p, truth) == pytest.approx(((p - np.eye(5)[truth]) ** 2).sum(axis=1).mean())
    assert calibration.top_accuracy(p, truth) == pytest.approx(top_k_accuracy_score(truth, p, k=3))


def test_ties_are_broken_by_label_id() -> None:
    p = np.full((5, 5), 0.2)
    assert calibration.top_accuracy(p, np.arange(5), k=2) == pytest.approx(2 / 5)


# --- risk and coverage ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.randoms())
def test_risk_and_coverage_do_not_depend_on_the_order(notes: list[tuple[float, bool]], random: object) -> None:
    shuffled = list(notes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    (p, right), (q, other) = (map(np.array, zip(*some, strict=True)) for some in (notes, shuffled))
    assert calibration.risks(p, right) == pytest.approx(calibration.risks(q, other))
    assert calibration.risks(p, right)[-1] == pytest.approx(1 - right.mean())


def test_risk_and_coverage_by_hand() -> None:
    """Right, wrong, and two equally sure of which one is right: risks 0, 1/2, 1/2, 1/2."""
    confidence, right = np.array([0.9, 0.8, 0.5, 0.5]), np.array([True, False, True, False])
    assert calibration.risks(confidence, right) == pytest.approx([0, 1 / 2, 1.5 / 3, 2 / 4])


def test_scores_of_the_most_confident_notes_by_hand() -> None:
    """Risks of right, wrong, right, right, right: 0, 1/2, 1/3, 1/4, 1/5; 80 % are four notes, 90 % four as well."""
    sure = [0.9, 0.8, 0.7, 0.6, 0.55]
    found = uncertainty(make_results([0, 1, 0, 0, 0], [0] * 5, [[p, 1 - p, 0.0] for p in sure]))
    assert found["aurc"] == pytest.approx(np.mean([0, 1 / 2, 1 / 3, 1 / 4, 1 / 5]))
    assert (found["accuracy_at_80"], found["accuracy_at_90"]) == (pytest.approx(3 / 4), pytest.approx(3 / 4))
