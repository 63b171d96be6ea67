"""Reliability and temperature scaling agree with scikit-learn and with hand calculation."""

from __future__ import annotations

import numpy as np
import pytest
from made_results import random_results
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, top_k_accuracy_score

from medlit.evaluation import calibration


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
