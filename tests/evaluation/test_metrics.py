"""The table of metrics is consistent, and scores of probabilities are those of scikit-learn."""

from __future__ import annotations

import pytest
from made_results import make_results, random_results
from sklearn import metrics as sk

from medlit.evaluation.metrics import (
    EMPTY,
    HYPERPARAMETERS,
    LOGGED,
    METRIC,
    METRICS,
    MONITORS,
    REPORTED,
    applicable,
    uncertainty,
)


def test_scores_of_probabilities_are_scikit_learn_s() -> None:
    one = random_results()
    assert one.probabilities is not None
    found = uncertainty(one)
    labels = list(range(len(one.names)))
    assert found["log_loss"] == pytest.approx(sk.log_loss(one.truth, one.probabilities, labels=labels))
    assert found["top3_accuracy"] == pytest.approx(sk.top_k_accuracy_score(one.truth, one.probabilities, k=3))
    squares = [sk.brier_score_loss(one.truth == i, one.probabilities[:, i]) for i in labels]
    assert found["brier"] == pytest.approx(sum(squares))


def test_without_probabilities_their_metrics_are_null() -> None:
    found = uncertainty(make_results([0, 1, 2], [0, 3, 2]))
    null = {name for name, value in found.items() if value is None}
    assert null == set(found) - {"accuracy_ci", "any_of_accuracy_ci", "accuracy_ci_bootstrap", "f1_macro_ci"}


def test_every_metric_of_the_table_is_computed() -> None:
    computed = set(uncertainty(random_results())) | set(LOGGED)
    assert {metric.name for metric in METRICS} <= computed
    assert {f"{name}_ci" for name in HYPERPARAMETERS} <= computed
    assert len(METRIC) == len(METRICS)


def test_monitors_are_the_logged_metrics_with_their_direction() -> None:
    assert MONITORS == {
        "val/loss": "min",
        "val/accuracy": "max",
        "val/any_of_accuracy": "max",
        "val/balanced_accuracy": "max",
        "val/f1_macro": "max",
        "val/f1_weighted": "max",
        "val/invalid_rate": "min",
    }


def test_the_metrics_of_an_older_version_have_empty_cells() -> None:
    assert {metric.value({}) for metric in METRICS} == {EMPTY}
    assert {metric.interval({}) for metric in METRICS} == {""}
    accuracy, *_ = REPORTED
    assert (accuracy.value({"accuracy": 0.5}), accuracy.interval({"accuracy_ci": (0.4, 0.6)})) == (
        "50.0%",
        "40.0 to 60.0%",
    )


def test_the_any_of_accuracy_is_shown_where_a_note_has_several_labels() -> None:
    names = [metric.name for metric in applicable(METRICS, {"several_labels": 3})]
    assert names == [metric.name for metric in METRICS]
    assert [metric.name for metric in applicable(METRICS, {"several_labels": 0})] == [
        name for name in names if name != "any_of_accuracy"
    ]
