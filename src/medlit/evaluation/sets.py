"""Sets of labels: every label whose probability reaches a threshold that was fitted on validation notes.

The threshold of a coverage gives a guarantee: of new texts like the validation texts, at least this share has one of
its labels in its set (split-conformal prediction: Vovk 2005, "Algorithmic Learning in a Random World"). The score is
the probability itself (LAC: Sadinle 2019, arXiv 1609.00451), since no other has smaller sets; docs/evaluation.md
compares. crepes and MAPIE have it, but count each copy of a text and keep all scores instead of a number.

N notes, K labels. `labels` marks those of each note, (N, K); `groups` is the number of each note's text, (N,);
the weights of a text's copies add up to 1.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from medlit.evaluation.calibration import at_temperature, fit_temperature
from medlit.evaluation.intervals import wilson
from medlit.evaluation.results import BoolArray, FloatArray, IntArray, Results

COVERAGES = (0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)  # fitted beside the requested one
BEST_F1 = "set"  # key of the threshold of the highest micro F1; that of a coverage is its number
_ROUNDING = 1e-6  # share of a threshold: float32 has seven digits


def prediction_sets(probabilities: FloatArray, threshold: float) -> BoolArray:
    """Whether each label is in a note's set, (N, K)."""
    return np.asarray(probabilities >= threshold * (1 - _ROUNDING))


def fit_thresholds(probabilities: FloatArray, labels: BoolArray, coverages: FloatArray, groups: IntArray) -> FloatArray:
    """The threshold for each coverage; 0, so that sets hold every label, where there are too few texts.

    A note's score is the probability of the likeliest of its labels. The threshold is the k-th highest score of n,
    k = ceil((n + 1) x coverage). The scores of a text's copies weigh as much as one score (Lee 2023, arXiv 2306.06342).
    """
    scores = np.where(labels, probabilities, 0.0).max(axis=1)
    weights, order = 1 / np.bincount(groups)[groups], np.argsort(-scores, kind="stable")
    needed, reached = (weights.sum() + 1) * np.asarray(coverages), np.cumsum(weights[order])
    return np.asarray(np.append(scores[order], 0.0)[np.searchsorted(reached.round(9), needed.round(9))])


def fit_f1_threshold(probabilities: FloatArray, labels: BoolArray, groups: IntArray) -> float:
    """The threshold, at least 0.01, whose sets have the highest micro F1 by texts; of several the highest."""
    kept = probabilities >= min(0.01, probabilities.max())  # of thousands of labels nearly all are less likely
    order = np.argsort(-probabilities[kept], kind="stable")
    weights = np.broadcast_to(1 / np.bincount(groups)[groups][:, None], labels.shape)
    of_kept, thresholds = weights[kept][order], probabilities[kept][order]
    hits, members = np.cumsum(of_kept * labels[kept][order]), np.cumsum(of_kept)
    f1 = (2 * hits / (members + weights[labels].sum())).round(12)  # sums of weights are not exact
    f1[:-1][thresholds[:-1] == thresholds[1:]] = 0.0  # no threshold divides equal probabilities
    return float(thresholds[f1.argmax()])


def calibrate(results: Results, coverage: float | None, power: float = 1.0) -> tuple[float, dict[str, float]]:
    """Temperature, and thresholds at it by their keys, from validation results that hold a prior to some power."""
    assert results.probabilities is not None
    temperature = fit_temperature(results.probabilities, results.truth, power)
    p, labels = at_temperature(results.probabilities, temperature), results.label_mask
    coverages = sorted({*COVERAGES, coverage or COVERAGES[-1]})
    thresholds = fit_thresholds(p, labels, np.array(coverages), results.groups).tolist()
    best_f1 = fit_f1_threshold(p, labels, results.groups)
    return temperature, dict(zip(map(str, coverages), thresholds, strict=True)) | {BEST_F1: best_f1}


def score_sets(sets: BoolArray, labels: BoolArray, groups: IntArray) -> dict[str, Any]:
    """Scores of at least one set, (N, K), in which a text counts once, however many copies it has.

    coverage, all_labels: share of sets with any and with all of the note's labels; 95 % interval. mean_size: labels.
    single, empty: share of sets with one label and none. f1_micro, f1_macro, exact_match, jaccard: as torchmetrics'
    multilabel forms, over the labels that occur.
    """
    weights, sizes, hits = 1 / np.bincount(groups)[groups], sets.sum(axis=1), sets & labels
    names = ("coverage", "all_labels", "exact_match", "mean_size", "single", "empty")
    each = (hits.any(axis=1), (hits == labels).all(axis=1), (sets == labels).all(axis=1), sizes, sizes == 1, sizes == 0)
    scores = {name: float(np.average(of, weights=weights)) for name, of in zip(names, each, strict=True)}
    found, total, texts = weights @ hits, weights @ sets + weights @ labels, round(weights.sum())
    scores["f1_micro"] = float(2 * found.sum() / total.sum())
    for name, parts in {"f1_macro": total / 2, "jaccard": total - found}.items():
        scores[name] = float((found[total > 0] / parts[total > 0]).mean())
    return {**scores, "notes": len(sets), "coverage_ci": wilson(round(scores["coverage"] * texts), texts)}


def sets_report(results: Results, temperature: float, thresholds: dict[str, float], key: str) -> dict[str, Any]:
    """`sets` of `<verb>_metrics.json`: scores of the sets by the threshold with this key; empty without it.

    per_class, by_length: of each label's notes, and of as many short as long prompts. by_coverage: (requested, reached,
    mean size) by each threshold of a coverage. The temperature is applied to the probabilities.
    """
    if results.probabilities is None or key not in thresholds:
        return {}
    p, labels, groups = at_temperature(results.probabilities, temperature), results.label_mask, results.groups

    def scores(notes: Any = slice(None), of: str = key) -> dict[str, Any]:  # noqa: ANN401 - an index
        return score_sets(prediction_sets(p[notes], thresholds[of]), labels[notes], groups[notes])

    curve = {name: scores(of=name) for name in thresholds if name != BEST_F1}
    return {
        "key": key,
        "threshold": thresholds[key],
        **scores(),
        "per_class": {name: scores(own) for name, own in zip(results.names, labels.T, strict=True) if own.any()},
        "by_length": [scores(part) | {"tokens": results.tokens[part[[0, -1]]].tolist()} for part in results.by_length],
        "by_coverage": [(float(k), one["coverage"], one["mean_size"]) for k, one in curve.items()],
    }


def doubts_of_coverage(coverage: float, results: Results, trained: Iterable[str] = ()) -> str:
    """Why new notes may be covered less often; empty if no label has too few texts and none is of `trained` hashes."""
    needed = int(np.ceil(np.round(coverage / (1 - coverage), 9)))  # fewer have no k-th highest score
    groups, marked = results.groups, zip(results.names, results.label_mask.T, strict=True)
    texts = {"in all": len(set(groups)), **{name: len(set(groups[own])) for name, own in marked}}
    few = [f"{name} {number}" for name, number in texts.items() if number < needed]
    listed = ", ".join(few[:6]) + f" and {len(few) - 6} more" * (len(few) > 6)
    doubts = [
        f"fewer than {needed} validation notes with different texts ({listed}); such a specialty may be covered less"
        f" often than {coverage:.0%}, and with fewer in all a set holds every label"
    ] * bool(few)
    if leaked := len({*results.text_hashes} & {*trained}):
        doubts.append(
            f"validation texts that are training texts too: {leaked}, so that new notes are covered less often; set"
            " data.split.kind to 'grouped' or 'official_clean'"
        )
    return f"model.decoding.coverage: {'. And '.join(doubts)}." if doubts else ""
