from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_results import make_results, random_results
from torchmetrics.functional.classification import (
    multilabel_exact_match,
    multilabel_f1_score,
    multilabel_jaccard_index,
)

from medlit.evaluation.calibration import at_temperature, fit_temperature
from medlit.evaluation.sets import (
    COVERAGES,
    calibrate,
    doubts_of_coverage,
    fit_f1_threshold,
    fit_thresholds,
    prediction_sets,
    score_sets,
    sets_report,
)

# Nine notes of which the true label has these probabilities; the other of two labels has the rest.
OF_TRUTH = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
TWO = np.stack([OF_TRUTH, 1 - OF_TRUTH], axis=1)
FIRST = np.tile([True, False], (9, 1))


@pytest.mark.parametrize(
    # By hand: k = ceil(10 x coverage), the k-th highest of the nine.
    ("coverage", "threshold"),
    [(0.5, 0.5), (0.51, 0.4), (0.6, 0.4), (0.8, 0.2), (0.9, 0.1), (0.91, 0.0), (0.99, 0.0)],
)
def test_the_threshold_is_the_finite_sample_quantile(coverage: float, threshold: float) -> None:
    assert fit_thresholds(TWO, FIRST, np.array([coverage]), np.arange(9))[0] == pytest.approx(threshold)


@pytest.mark.parametrize(("coverage", "needed"), [(0.55, 2), (0.75, 3), (0.9, 9), (0.95, 19), (0.99, 99)])
def test_a_set_holds_every_label_where_there_are_too_few_texts(coverage: float, needed: int) -> None:
    for texts in (needed - 1, needed):
        p = np.full((texts, 2), 0.5)
        threshold = fit_thresholds(p, p > 0, np.array([coverage]), np.arange(texts))[0]
        assert (threshold > 0) == (texts == needed)
        assert prediction_sets(np.array([1.0, 0.0]), threshold).tolist() == [True, texts < needed]
        one_label = make_results([0] * texts, [0] * texts, names=("Heart",))
        warning = f"fewer than {needed} validation notes with different texts (in all {texts}, Heart {texts});"
        lacking = doubts_of_coverage(coverage, one_label)
        assert lacking == "" if texts == needed else warning in lacking


def test_copies_of_a_text_do_not_make_a_specialty_s_notes_enough() -> None:
    # At a coverage of 0.75 three texts are enough: Bones has four in five notes, Heart two in six, Nerves three.
    texts = [*"aabcd", *"efefef", *"fgh"]
    several = make_results([0] * 5 + [1] * 6 + [2] * 3, [0] * 14, texts=texts)
    sentence = doubts_of_coverage(0.75, several)
    assert "fewer than 3 validation notes with different texts (Heart 2);" in sentence
    second = [[label] for label in several.truth.tolist()]
    second[0] = [0, 1]  # text a is the third with the label Heart
    assert doubts_of_coverage(0.75, replace(several, accepted=second)) == ""


def test_validation_texts_that_were_trained_on_are_counted() -> None:
    results = make_results([0] * 6, [0] * 6, names=("Heart",), texts=[*"aabcde"])
    assert doubts_of_coverage(0.75, results, ["f"]) == ""
    said = "validation texts that are training texts too: 2, so that new notes are covered less often; set data.split"
    assert doubts_of_coverage(0.75, results, [*"aacf"]).startswith(f"model.decoding.coverage: {said}")
    assert f". And {said}" in doubts_of_coverage(0.95, results, [*"aacf"])


def test_six_specialties_with_few_notes_are_named() -> None:
    sentence = doubts_of_coverage(0.9, make_results(list(range(8)), [0] * 8, names=tuple("abcdefgh")))
    assert "(in all 8, a 1, b 1, c 1, d 1, e 1 and 3 more);" in sentence


def test_the_best_of_several_labels_counts() -> None:
    p = np.array([[0.6, 0.3, 0.1]])
    assert fit_thresholds(p, np.array([[False, True, True]]), np.array([0.5]), np.zeros(1, int))[0] == 0.3
    assert fit_thresholds(p, np.array([[True, False, True]]), np.array([0.5]), np.zeros(1, int))[0] == 0.6


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), copies=st.integers(2, 9), coverage=st.floats(0.5, 0.99))
def test_copies_of_a_text_count_once(seed: int, copies: int, coverage: float) -> None:
    draw = np.random.default_rng(seed)
    p, labels = draw.dirichlet(np.ones(4), 60), np.eye(4, dtype=bool)[draw.integers(0, 4, 60)]
    groups = np.arange(60)
    several = np.concatenate([groups, np.repeat(draw.integers(0, 60, 5), copies)])
    alone = fit_thresholds(p, labels, np.array([coverage]), groups)
    assert fit_thresholds(p[several], labels[several], np.array([coverage]), several) == alone
    sets = prediction_sets(p, float(alone[0]))
    once, each = score_sets(sets, labels, groups), score_sets(sets[several], labels[several], several)
    assert each.pop("notes") > once.pop("notes")
    assert {name: pytest.approx(value) for name, value in each.items()} == once


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("copied", [1, 20])
def test_the_promise_holds_on_new_texts(coverage: float, copied: int) -> None:
    """On average over validation splits of 100 texts, of which a tenth has copies, and at most 1/101 above."""
    draw, reached = np.random.default_rng(0), []
    for _ in range(300):
        labels = np.eye(5, dtype=bool)[draw.integers(0, 5, 400)]
        scores = np.exp(draw.normal(size=(400, 5)) + 2 * labels)
        p = scores / scores.sum(axis=1, keepdims=True)
        groups = np.repeat(np.arange(100), np.where(np.arange(100) < 10, copied, 1))
        threshold = fit_thresholds(p[groups], labels[groups], np.array([coverage]), groups)[0]
        reached.append(score_sets(prediction_sets(p[100:], threshold), labels[100:], np.arange(300))["coverage"])
    assert coverage - 0.005 <= np.mean(reached) <= coverage + 1 / 101 + 0.005


def test_one_more_label_in_each_set_never_lowers_coverage() -> None:
    results = random_results()
    assert results.probabilities is not None
    coverages = np.linspace(0.5, 0.99, 50)
    thresholds = fit_thresholds(results.probabilities, results.label_mask, coverages, results.groups)
    assert (np.diff(thresholds) <= 0).all()
    scores = [
        score_sets(prediction_sets(results.probabilities, t), results.label_mask, results.groups) for t in thresholds
    ]
    assert (np.diff([one["mean_size"] for one in scores]) >= 0).all()
    assert (np.diff([one["coverage"] for one in scores]) >= 0).all()


def test_scores_of_sets_by_hand() -> None:
    sets = np.array([[True, False, False], [True, True, False], [False, False, False], [False, True, False]])
    labels = np.array([[True, True, False], [True, True, False], [True, False, False], [True, False, False]])
    scores = score_sets(sets, labels, np.arange(4))
    assert scores.pop("coverage_ci") == pytest.approx((0.15, 0.85), abs=1e-3)
    expected = {
        "coverage": 0.5,
        "all_labels": 0.25,
        "mean_size": 1.0,
        "single": 0.5,
        "empty": 0.25,
        "exact_match": 0.25,
    }
    # Of the first two labels, 2 and 1 are found of 2 and 2 in sets and 4 and 2 in truth.
    f1 = {"f1_micro": 6 / 10, "f1_macro": (4 / 6 + 2 / 4) / 2, "jaccard": (2 / 4 + 1 / 3) / 2}
    assert scores == pytest.approx(expected | f1 | {"notes": 4})


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_scores_of_sets_are_torchmetrics_multilabel_forms(seed: int) -> None:
    draw = np.random.default_rng(seed)
    sets, labels = (draw.random((30, 4)) < 0.4 for _ in range(2))
    sets[0], labels[0] = True, True  # every label occurs
    pair = torch.from_numpy(sets).int(), torch.from_numpy(labels).int()
    scores = score_sets(sets, labels, np.arange(30))
    for average in ("micro", "macro"):
        assert scores[f"f1_{average}"] == pytest.approx(float(multilabel_f1_score(*pair, 4, average=average)))
    assert scores["exact_match"] == pytest.approx(float(multilabel_exact_match(*pair, 4)))
    assert scores["jaccard"] == pytest.approx(float(multilabel_jaccard_index(*pair, 4)))


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_threshold_has_a_higher_micro_f1(seed: int) -> None:
    draw = np.random.default_rng(seed)
    p, labels = draw.integers(0, 9, (20, 3)) / 8, draw.random((20, 3)) < 0.4
    p[0, 0], labels[0, 0] = 1, True

    def f1(threshold: float) -> float:
        sets = prediction_sets(p, threshold)
        return float(2 * (sets & labels).sum() / (sets.sum() + labels.sum()))

    assert f1(fit_f1_threshold(p, labels, np.arange(20))) == max(f1(threshold) for threshold in np.unique(p[p > 0]))


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1))
def test_copies_of_a_text_do_not_move_the_threshold(seed: int) -> None:
    draw = np.random.default_rng(seed)
    p, labels = draw.dirichlet(np.ones(4), 12), draw.random((12, 4)) < 0.4
    labels[0, 0] = True
    copies = np.sort(np.append(np.arange(12), draw.integers(0, 12, 20)))
    assert fit_f1_threshold(p[copies], labels[copies], copies) == fit_f1_threshold(p, labels, np.arange(12))


def test_one_of_very_many_labels_is_likely_enough() -> None:
    p = np.full((3, 200), 1 / 200)
    assert fit_f1_threshold(p, np.eye(3, 200, dtype=bool), np.arange(3)) == 1 / 200


def test_the_labels_of_results_as_a_mask() -> None:
    results = make_results([0, 2], [0, 1])
    assert results.label_mask.tolist() == [[True, False, False], [False, False, True]]


def test_thresholds_of_all_coverages_are_fitted_at_the_temperature() -> None:
    results = random_results()
    assert results.probabilities is not None
    temperature, thresholds = calibrate(results, 0.875)
    assert temperature == fit_temperature(results.probabilities, results.truth)
    p = at_temperature(results.probabilities, temperature)
    assert thresholds["0.875"] == fit_thresholds(p, results.label_mask, np.array([0.875]), results.groups)[0]
    assert thresholds.keys() == {"0.875", "set", *map(str, COVERAGES)}
    assert thresholds["set"] == fit_f1_threshold(p, results.label_mask, results.groups)


def test_a_report_on_sets_agrees_with_their_scores() -> None:
    results = replace(random_results(), tokens=np.arange(200) % 50 + 1)
    temperature, thresholds = calibrate(results, 0.9)
    report = sets_report(results, temperature, thresholds, "0.9")
    p, labels = at_temperature(results.probabilities, temperature), results.label_mask  # type: ignore[arg-type]
    sets = prediction_sets(p, thresholds["0.9"])
    assert report.items() >= score_sets(sets, labels, results.groups).items()
    assert 0.9 <= report["coverage"] <= 0.95, "on the notes that it was fitted to"
    assert sum(part["notes"] for part in report["per_class"].values()) == 200
    assert sum(part["notes"] for part in report["by_length"]) == 200
    ends = [end for part in report["by_length"] for end in part["tokens"]]
    assert (len(ends), ends) == (12, sorted(set(ends))), "no length is in two parts"
    assert [point[0] for point in report["by_coverage"]] == list(COVERAGES)
    assert (0.9, report["coverage"], report["mean_size"]) in report["by_coverage"]
    of_one = labels[:, 1]
    found = report["per_class"][results.names[1]]
    assert found == score_sets(sets[of_one], labels[of_one], results.groups[of_one])


def test_there_are_no_sets_without_probabilities_or_a_threshold() -> None:
    assert sets_report(random_results(), 1.0, {"0.9": 0.5}, "") == {}
    assert sets_report(random_results(), 1.0, {"0.9": 0.5}, "0.95") == {}
    assert sets_report(make_results([0], [0]), 1.0, {"0.9": 0.5}, "0.9") == {}
