"""Quality of probabilities: proper scores, calibration error, temperature scaling, selective prediction.

N notes, K labels. Confidence is the probability of the label that was answered.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp, softmax

from medlit.evaluation.results import BoolArray, FloatArray, IntArray

BINS = 10
_SMALLEST = 1e-15  # the log loss of a probability that was rounded to 0 would be infinite
_LOG_TEMPERATURES = (np.log(0.05), np.log(20.0))  # search range
_POWERS = (0.0, 20.0)


def log_loss(probabilities: FloatArray, truth: IntArray) -> float:
    """Mean negative log-probability of the true label, in nats."""
    clipped = np.maximum(probabilities, _SMALLEST)
    return float(np.log(clipped.sum(axis=1) / clipped[np.arange(len(truth)), truth]).mean())


def brier(probabilities: FloatArray, truth: IntArray) -> float:
    """Mean squared distance of the K probabilities from the one-hot true label, 0 to 2 (Brier 1950)."""
    of_truth = probabilities[np.arange(len(truth)), truth]
    return float((np.einsum("nk,nk->n", probabilities, probabilities) - 2 * of_truth + 1).mean())


def top_accuracy(probabilities: FloatArray, truth: IntArray, k: int = 3) -> float:
    """Share of notes whose true label is among the k most probable; ties are broken by label id."""
    of_truth = probabilities[np.arange(len(truth)), truth][:, None]
    ties_before = (probabilities == of_truth) & (np.arange(probabilities.shape[1]) < truth[:, None])
    return float((((probabilities > of_truth) | ties_before).sum(axis=1) < k).mean())


@dataclass(frozen=True)
class Reliability:
    """Bins of equally many notes, the least confident first."""

    confidence: FloatArray  # mean confidence of each bin
    accuracy: FloatArray  # share of correct answers in each bin; those of equal confidence count as their mean
    notes: IntArray  # number of notes in each bin

    @property
    def error(self) -> float:
        """Expected calibration error (Naeini 2015; bins of equal mass: Nguyen and O'Connor 2015, arXiv 1508.05154)."""
        return float((np.abs(self.confidence - self.accuracy) * self.notes).sum() / self.notes.sum())


def reliability(confidence: FloatArray, correct: BoolArray, bins: int = BINS) -> Reliability:
    """Sort notes by confidence and split them into bins of equal size, to within one note."""
    parts = [part for part in np.array_split(np.argsort(confidence, kind="stable"), bins) if len(part)]
    of_notes = confidence, _accuracy_of_equals(confidence, correct)
    means, accuracies = (np.array([each[part].mean() for part in parts]) for each in of_notes)
    return Reliability(means, accuracies, np.array([len(part) for part in parts]))


def _accuracy_of_equals(confidence: FloatArray, correct: BoolArray) -> FloatArray:
    """Share of correct answers among the notes as confident as each, (N,): the order of these means nothing."""
    value = np.unique(confidence, return_inverse=True)[1]
    return np.asarray((np.bincount(value, weights=correct) / np.bincount(value))[value])


def fit_temperature(probabilities: FloatArray, truth: IntArray, power: float = 1.0) -> float:
    """The temperature of least log loss (Guo 2017, arXiv 1706.04599); over 1 for an overconfident model.

    Where no answer is wrong nothing bounds it, nor the `power` of a prior: it is then this power, and at least 1.
    """
    if np.isfinite(probabilities).all() and (probabilities.argmax(axis=1) == truth).all():
        return max(1.0, power)
    logs = log_probabilities(probabilities)
    # Not `log_loss`, whose least probability would put a bound on what an error costs at a low temperature.
    margins = logs - logs[np.arange(len(truth)), truth][:, None]
    best = minimize_scalar(lambda t: logsumexp(margins / np.exp(t), axis=1).mean(), bounds=_LOG_TEMPERATURES)
    return float(np.exp(best.x))


def log_probabilities(probabilities: FloatArray) -> FloatArray:
    """Their logarithms, finite for 0 too."""
    return np.asarray(np.log(np.maximum(probabilities, np.finfo(np.float64).tiny)))


def at_temperature(probabilities: FloatArray, temperature: float) -> FloatArray:
    """Divide log-probabilities by a temperature and normalise; the order of the labels does not change."""
    return np.asarray(softmax(log_probabilities(probabilities) / temperature, axis=1))


def fit_powers(logs: Sequence[FloatArray], labels: BoolArray) -> tuple[float, ...]:
    """The powers to which the systems' probabilities are raised so that their product fits the notes' labels best.

    Best is the highest mean log-probability of any of a note's labels. `logs` are log-probabilities of each system,
    (N, K); `labels` marks those of each note, at least one, (N, K).
    """

    def loss(powers: FloatArray) -> float:
        scores = np.tensordot(powers, np.stack(logs), 1)
        return float((logsumexp(scores, axis=1) - logsumexp(scores, axis=1, b=labels)).mean())

    best = minimize(loss, np.full(len(logs), 1 / len(logs)), bounds=[_POWERS] * len(logs), method="L-BFGS-B")
    return tuple(float(value) for value in best.x)


def power_product(logs: Sequence[FloatArray], powers: Sequence[float]) -> FloatArray:
    """The product of the systems' probabilities to these powers, normalised, (N, K)."""
    return np.asarray(softmax(np.tensordot(np.asarray(powers), np.stack(logs), 1), axis=1), dtype=np.float64)


def risks(confidence: FloatArray, correct: BoolArray) -> FloatArray:
    """Risk when the most confident 1, 2, ... N notes are answered, (N,); the mean: AURC (Geifman 2019, 1805.08206)."""
    errors = 1 - _accuracy_of_equals(confidence, correct)[np.argsort(-confidence)]
    return np.asarray(np.cumsum(errors) / np.arange(1, len(errors) + 1))
