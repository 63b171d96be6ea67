"""A figure has a bounded size whatever the number of labels, and draws every name."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from made_results import random_results
from matplotlib.figure import Figure

from medlit.report.figures import (
    MOST_CONFUSED,
    MOST_LABELS,
    class_figure,
    confusion_figure,
    length_figure,
    risk_coverage_figure,
    short,
)
from medlit.report.systems import System


def tick_labels(figure: Figure, axis: str) -> list[str]:
    return [label.get_text() for label in getattr(figure.axes[0], f"get_{axis}ticklabels")()]


@pytest.mark.parametrize("k", [MOST_LABELS, MOST_LABELS + 1, 500, 5000])
def test_the_confusion_matrix_has_a_bounded_size_and_says_what_it_leaves_out(k: int) -> None:
    results = random_results(3 * MOST_LABELS, k, signal=3)
    figure = confusion_figure(results, "made up")
    more = k > MOST_LABELS
    shown = MOST_CONFUSED if more else MOST_LABELS
    assert len(tick_labels(figure, "y")) == shown
    assert len(tick_labels(figure, "x")) == shown + 1 + more
    assert (tick_labels(figure, "x")[-2] == "others") == more
    assert (f"{shown} most confused of {k:,} specialties" in figure.axes[0].get_title()) == more
    assert max(figure.get_size_inches()) < 30


def test_the_labels_of_the_most_frequent_errors_are_shown_and_their_rows_are_complete() -> None:
    results = random_results(300, 100, signal=90)
    answer = results.answer.copy()
    wrong = np.flatnonzero(results.truth >= 90)
    answer[wrong] = 0
    answer[np.flatnonzero(results.truth == 95)[:1]] = 100  # invalid
    figure = confusion_figure(replace(results, answer=answer), "made up")
    names = [name.partition(" (")[0] for name in tick_labels(figure, "y")]
    assert {results.names[0], *(results.names[label] for label in np.unique(results.truth[wrong]))} <= set(names)
    drawn = sum(int(text.get_text() or 0) for text in figure.axes[0].texts)
    assert drawn == sum(results.names[label] in names for label in results.truth)


def test_the_specialties_with_the_most_notes_are_shown() -> None:
    results = random_results(900, 300)
    figure = class_figure([System.score("test", results)])
    support = np.bincount(results.truth, minlength=300)
    assert sum(int(name.rpartition("(")[2][:-1]) for name in tick_labels(figure, "y")) == np.sort(support)[-60:].sum()
    assert "the 60 most frequent of 300 specialties" in figure.axes[0].get_title()


def test_names_that_look_like_formulas_or_have_no_end_are_drawn() -> None:
    names = ("costs $5 to $6^{", r"$\frac{a}$", "a" * 100)
    results = replace(random_results(30, 3), names=names)
    for figure in (confusion_figure(results, "made up"), class_figure([System.score("test", results)])):
        figure.savefig(io.BytesIO(), format="png")
    assert len(short("a" * 50 + "b" * 50)) == 41
    assert short("Neurology") == "Neurology"


def test_systems_with_equal_scores_do_not_hide_each_other() -> None:
    results = random_results(90, 3)
    wrong = replace(results, answer=(results.truth + 1) % 3)
    figure = class_figure([System.score(name, wrong) for name in ("test", "tfidf", "zero_shot", "majority")])
    dots = [tuple(np.ravel(dot)) for marks in figure.axes[0].collections for dot in marks.get_offsets()]  # type: ignore[attr-defined]
    assert len(set(dots)) == len(dots) == 9


def test_a_curve_above_the_axis_is_named_so() -> None:
    results = random_results(90, 3, signal=80)
    right = replace(results, answer=results.truth)
    wrong = replace(results, answer=(results.truth + 1) % 3)
    figure = risk_coverage_figure([System.score("test", right), System.score("majority", wrong)])
    (legend,) = figure.legends
    assert ["above the axis" in text.get_text() for text in legend.get_texts()] == [False, True]


def test_prompts_of_one_length_are_in_one_bin() -> None:
    tokens = np.array([7] * 50 + [8] * 3 + [1000] * 37)
    figure = length_figure(System.score("test", replace(random_results(90, 3), tokens=tokens)))
    assert [label.partition("\n")[0] for label in tick_labels(figure, "x")] == ["7-8", "1,000"]
