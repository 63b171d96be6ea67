"""Whether a probability means what it says: proper scores, expected calibration error, temperature.

N notes, K labels. Confidence is the probability of the label that was answered.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.metrics import log_loss as sklearn_log_loss

from medlit.evaluation.results import FloatArray, IntArray

BINS = 10
# A probability that was rounded to 0 would cost infinitely many nats.
_LEAST = 1e-15
_RANGE = (0.05, 20.0)  # temperatures looked at


def log_loss(probabilities: FloatArray, truth: IntArray) -> float:
    """Mean negative log-probability of the truth, in nats."""
    kept = np.maximum(probabilities, _LEAST)
    kept = kept / kept.sum(axis=1, keepdims=True)
    return float(sklearn_log_loss(truth, kept, labels=np.arange(kept.shape[1])))


def brier(probabilities: FloatArray, truth: IntArray) -> float:
    """Mean squared distance of the K probabilities from the truth, 0 to 2 (Brier 1950)."""
    wanted = np.eye(probabilities.shape[1])[truth]
    return float(((probabilities - wanted) ** 2).sum(axis=1).mean())


def top_accuracy(probabilities: FloatArray, truth: IntArray, k: int = 3) -> float:
    """Share of notes whose truth is among the k likeliest labels."""
    # A label is beaten by those that are likelier; equal ones come in the order of the list.
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return float((order == truth[:, None]).any(axis=1).mean())


@dataclass(frozen=True)
class Reliability:
    """Bins of equally many notes, the least confident first.

    Attributes:
        confidence: mean confidence of each bin.
        accuracy: share answered rightly in each bin.
        notes: in each bin.
    """

    confidence: FloatArray
    accuracy: FloatArray
    notes: IntArray

    @property
    def error(self) -> float:
        """Expected calibration error (Naeini 2015; bins of equal mass: Nguyen and O'Connor 2015, arXiv 1508.05154)."""
        return float((np.abs(self.confidence - self.accuracy) * self.notes).sum() / self.notes.sum())


def reliability(confidence: FloatArray, correct: npt.NDArray[np.bool_], bins: int = BINS) -> Reliability:
    """Sort notes by confidence and cut them into bins of equal size, to within one note."""
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return Reliability(
        confidence=np.array([confidence[part].mean() for part in parts]),
        accuracy=np.array([correct[part].mean() for part in parts]),
        notes=np.array([len(part) for part in parts]),
    )


def fit_temperature(probabilities: FloatArray, truth: IntArray) -> float:
    """The temperature that makes the truth likeliest (Guo 2017, arXiv 1706.04599): over 1 for a model too sure."""
    found = minimize_scalar(
        lambda log_t: log_loss(at_temperature(probabilities, float(np.exp(log_t))), truth),
        bounds=tuple(np.log(_RANGE)),
        method="bounded",
    )
    return float(np.exp(found.x))


def at_temperature(probabilities: FloatArray, temperature: float) -> FloatArray:
    """Divide log-probabilities by a temperature and normalise; the order of the labels stays."""
    scaled: FloatArray = softmax(np.log(np.maximum(probabilities, _LEAST)) / temperature, axis=1)
    return scaled
