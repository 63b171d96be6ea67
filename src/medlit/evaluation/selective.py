"""Selective prediction: error rate (risk) against the share of notes that is answered (coverage).

The most confident notes are answered first; the risk at coverage c is the share of errors among them (El-Yaniv and
Wiener 2010). Notes of equal confidence share their errors, so no number depends on the order of the rows.
"""

from __future__ import annotations

import numpy as np

from medlit.evaluation.results import BoolArray, FloatArray

POINTS = 20


def risks(confidence: FloatArray, correct: BoolArray) -> FloatArray:
    """Risk when the most confident 1, 2, ... N notes are answered, (N,)."""
    _, rank = np.unique(-confidence, return_inverse=True)
    rank = rank.reshape(-1)
    shared = np.bincount(rank, weights=~correct) / np.bincount(rank)
    errors = shared[np.sort(rank)]
    risk: FloatArray = np.cumsum(errors) / np.arange(1, len(errors) + 1)
    return risk


def aurc(confidence: FloatArray, correct: BoolArray) -> float:
    """Area under the risk-coverage curve (Geifman 2019, arXiv 1805.08206): the mean risk; lower is better."""
    return float(risks(confidence, correct).mean())


def accuracy_at(coverage: float, confidence: FloatArray, correct: BoolArray) -> float:
    """Accuracy on the most confident share of the notes, at least one note."""
    n = max(1, round(coverage * len(confidence)))
    return float(1 - risks(confidence, correct)[n - 1])


def curve(confidence: FloatArray, correct: BoolArray) -> list[tuple[float, float]]:
    """(coverage, risk) at 20 coverages."""
    risk = risks(confidence, correct)
    n = len(risk)
    counts = np.unique(np.ceil(np.linspace(0, n, POINTS + 1)[1:]).astype(int))
    return [(float(i / n), float(risk[i - 1])) for i in counts]
