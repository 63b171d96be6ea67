"""What is gained by leaving the least certain notes to a person: risk against coverage.

Notes are taken in the order of their confidence; at coverage c the surest share c is answered, and the risk is the
share of errors among those (El-Yaniv and Wiener 2010). Notes of equal confidence share their errors, so that no number
depends on the order of the rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medlit.evaluation.results import FloatArray

POINTS = 20


def risks(confidence: FloatArray, correct: npt.NDArray[np.bool_]) -> FloatArray:
    """Risk when the surest 1, 2, ... N notes are answered, (N,)."""
    _, place = np.unique(-confidence, return_inverse=True)
    place = place.reshape(-1)
    shared = np.bincount(place, weights=~correct) / np.bincount(place)
    errors = shared[np.sort(place)]
    risk: FloatArray = np.cumsum(errors) / np.arange(1, len(errors) + 1)
    return risk


def aurc(confidence: FloatArray, correct: npt.NDArray[np.bool_]) -> float:
    """Area under the risk-coverage curve (Geifman 2019, arXiv 1805.08206): the mean risk; smaller is better."""
    return float(risks(confidence, correct).mean())


def accuracy_at(coverage: float, confidence: FloatArray, correct: npt.NDArray[np.bool_]) -> float:
    """Accuracy on the surest share of the notes, at least one."""
    n = max(1, round(coverage * len(confidence)))
    return float(1 - risks(confidence, correct)[n - 1])


def curve(confidence: FloatArray, correct: npt.NDArray[np.bool_]) -> list[tuple[float, float]]:
    """The curve at 20 coverages: (coverage, risk)."""
    risk = risks(confidence, correct)
    n = len(risk)
    taken = np.unique(np.ceil(np.linspace(0, n, POINTS + 1)[1:]).astype(int))
    return [(float(i / n), float(risk[i - 1])) for i in taken]
