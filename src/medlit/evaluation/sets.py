"""Sets of labels: every label whose probability reaches a threshold that was fitted on validation notes.

Two thresholds. `fit_thresholds` makes a promise: a set holds a label of its note in at least the share of new texts
that is asked for, if they are like the validation texts (split-conformal prediction: Vovk 2005, "Algorithmic Learning
in a Random World"; Angelopoulos 2021, arXiv 2107.07511). `fit_f1_threshold` makes the sets an answer.

The score is the probability itself (LAC: Sadinle 2019, arXiv 1609.00451), since no other gives smaller sets on average;
APS (Romano 2020, arXiv 2006.02544) and RAPS (Angelopoulos 2021, arXiv 2009.14193) add labels to the sets of certain
notes. crepes, MAPIE and torchcp have LAC too, but none counts copies of a text once or leaves a single number that an
adapter can keep.

N notes, K labels. `labels` marks those of each note, (N, K); `groups` is the number of each note's text, (N,).
"""

from typing import TypedDict

import numpy as np

from medlit.evaluation.intervals import Interval, wilson
from medlit.evaluation.results import BoolArray, FloatArray, IntArray

_ROUNDING = 1e-6  # share of a threshold: float32 has seven digits


class SetScores(TypedDict):
    """Scores of sets, in which a text counts once, however many copies it has."""

    coverage: float  # share of sets with any of the note's labels
    coverage_ci: Interval  # 95 %, Wilson's
    all_labels: float  # share of sets with all of them
    mean_size: float  # labels
    single: float  # share of sets with one label
    empty: float  # share without any


def prediction_sets(probabilities: FloatArray, threshold: float) -> BoolArray:
    """Whether each label is in a note's set, (N, K)."""
    sets: BoolArray = probabilities >= threshold * (1 - _ROUNDING)
    return sets


def fit_thresholds(
    probabilities: FloatArray, labels: BoolArray, coverages: FloatArray, groups: IntArray | None = None
) -> FloatArray:
    """The threshold for each coverage; 0, so that sets hold every label, where there are too few texts.

    A note's score is the probability of the likeliest of its labels. The threshold is the k-th highest score of n,
    k = ceil((n + 1) x coverage). The scores of a text's copies weigh as much as one score (Lee 2023, arXiv 2306.06342).
    """
    scores = np.where(labels, probabilities, 0.0).max(axis=1)
    weights, order = _weights(len(scores), groups), np.argsort(-scores, kind="stable")
    needed = np.round((weights.sum() + 1) * np.asarray(coverages), 9)
    reached = np.round(np.cumsum(weights[order]), 9)
    thresholds: FloatArray = np.append(scores[order], 0.0)[np.searchsorted(reached, needed)]
    return thresholds


def fewest_texts(coverage: float) -> int:
    """Validation texts without which a set must hold every label, n >= coverage / (1 - coverage)."""
    return int(np.ceil(np.round(coverage / (1 - coverage), 9)))


def fit_f1_threshold(probabilities: FloatArray, labels: BoolArray) -> float:
    """The threshold of which the sets have the highest micro F1; the highest one of several."""
    flat = probabilities.ravel()
    order = np.argsort(-flat, kind="stable")
    hits, ordered = np.cumsum(labels.ravel()[order]), flat[order]
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + hits[-1])
    f1[:-1][ordered[:-1] == ordered[1:]] = 0.0  # no threshold divides equal probabilities
    return float(ordered[f1.argmax()])


def score_sets(sets: BoolArray, labels: BoolArray, groups: IntArray | None = None) -> SetScores:
    """Coverage and size of at least one set, (N, K)."""
    weights, sizes = _weights(len(sets), groups), sets.sum(axis=1)

    def mean(values: BoolArray | IntArray) -> float:
        return float(np.average(values, weights=weights))

    coverage, texts = mean((sets & labels).any(axis=1)), round(weights.sum())
    return SetScores(
        coverage=coverage,
        coverage_ci=wilson(round(coverage * texts), texts),
        all_labels=mean((sets | ~labels).all(axis=1)),
        mean_size=mean(sizes),
        single=mean(sizes == 1),
        empty=mean(sizes == 0),
    )


def _weights(n: int, groups: IntArray | None) -> FloatArray:
    """Of N notes, so that those of a group have the weight 1 together, (N,)."""
    return np.ones(n) if groups is None else 1 / np.bincount(groups)[groups]
