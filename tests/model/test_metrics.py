"""The numbers are scikit-learn's, and an answer off the list is wrong without being a class."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from medlit.data.collate import Collator, TokenisedNote
from medlit.data.labels import LabelSet
from medlit.model.decoding import Answers
from medlit.model.metrics import Scores, SpecialtyMetrics, batch_results


def scores(truth: list[int], answers: list[int], k: int, batch: int = 1000) -> Scores:
    metrics = SpecialtyMetrics(LabelSet.from_names([f"specialty {i:02}" for i in range(k)]))
    for start in range(0, len(truth), batch):
        metrics.update(torch.tensor(answers[start : start + batch]), torch.tensor(truth[start : start + batch]))
    return metrics.scores()


@st.composite
def epochs(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """K labels, and for each of some notes its label, 0 .. K-1, and its answer, 0 .. K."""
    k = draw(st.integers(2, 13))
    pairs = draw(st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k)), min_size=1, max_size=60))
    return k, [pair[0] for pair in pairs], [pair[1] for pair in pairs]


@settings(deadline=None, max_examples=60)
@given(epochs(), st.integers(1, 60))
def test_every_number_is_scikit_learns(epoch: tuple[int, list[int], list[int]], batch: int) -> None:
    k, truth, answers = epoch
    ours = scores(truth, answers, k, batch)
    labels = list(range(k))
    precision, recall, f1, support = precision_recall_fscore_support(truth, answers, labels=labels, zero_division=0)
    per_class = list(ours["per_class"].values())
    assert ours["accuracy"] == pytest.approx(accuracy_score(truth, answers))
    assert [one["precision"] for one in per_class] == pytest.approx(precision)
    assert [one["recall"] for one in per_class] == pytest.approx(recall)
    assert [one["f1"] for one in per_class] == pytest.approx(f1)
    assert [one["support"] for one in per_class] == support.tolist()
    weighted = f1_score(truth, answers, labels=labels, average="weighted", zero_division=0)
    assert ours["f1_weighted"] == pytest.approx(weighted)
    occurring = sorted(set(truth) | set(answers) - {k})
    macro = f1_score(truth, answers, labels=occurring, average="macro", zero_division=0)
    assert ours["f1_macro"] == pytest.approx(macro)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "y_pred contains classes not in y_true")
        assert ours["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, answers))
    confusion = confusion_matrix(truth, answers, labels=[*labels, k])[:k]
    assert np.array_equal(ours["confusion"], confusion)
    assert ours["invalid_rate"] == pytest.approx(np.mean(np.array(answers) == k))
    assert ours["n"] == len(truth)


def test_an_invalid_answer_has_no_part_in_the_macro_mean() -> None:
    """The mean over K + 1 classes would be 0.667."""
    ours = scores(truth=[0, 0, 1, 2], answers=[0, 3, 1, 2], k=3)
    assert ours["f1_macro"] == pytest.approx(8 / 9)
    assert ours["accuracy"] == pytest.approx(3 / 4)
    assert ours["invalid_rate"] == pytest.approx(1 / 4)


def test_accuracy_is_over_notes_and_not_over_classes() -> None:
    ours = scores(truth=[0] * 9 + [1], answers=[0] * 10, k=2)
    assert ours["accuracy"] == pytest.approx(0.9)
    assert ours["balanced_accuracy"] == pytest.approx(0.5)


def test_a_class_without_notes_has_no_part_in_the_balanced_accuracy() -> None:
    """Class 2 is only answered, class 3 does not occur; an invalid answer is a note of class 1 not found."""
    assert scores(truth=[0, 0, 1, 1], answers=[0, 2, 1, 4], k=4)["balanced_accuracy"] == pytest.approx(0.5)


def test_nothing_but_invalid_answers_is_zero() -> None:
    ours = scores(truth=[0, 1, 1], answers=[2, 2, 2], k=2)
    assert (ours["accuracy"], ours["f1_macro"], ours["f1_weighted"], ours["invalid_rate"]) == (0, 0, 0, 1)
    assert ours["balanced_accuracy"] == 0
    assert ours["confusion"] == [[0, 0, 1], [0, 0, 2]]


def test_memory_does_not_grow_with_the_square_of_the_labels() -> None:
    names = tuple(f"specialty {i:04}" for i in range(5000))
    metrics = SpecialtyMetrics(LabelSet(names))
    metrics.update(torch.tensor([0, 4999, 5000]), torch.tensor([0, 4999, 7]))
    assert sum(count.numel() for count in metrics.compute().values()) == 3 * 5001 + 2
    found = metrics.scores()
    assert found["confusion"] is None
    assert (found["accuracy"], found["invalid_rate"]) == pytest.approx((2 / 3, 1 / 3))
    assert [name for name, one in found["per_class"].items() if one["support"]] == [names[0], names[7], names[4999]]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True), st.integers(0, 5)), min_size=1)
)
def test_any_of_a_note_s_labels_is_right(notes: list[tuple[list[int], int]]) -> None:
    metrics = SpecialtyMetrics(LabelSet(tuple("abcde")))
    answers, truth = [answer for _, answer in notes], [own[0] for own, _ in notes]
    accepted = [own + own[:1] * (3 - len(own)) for own, _ in notes]
    metrics.update(torch.tensor(answers), torch.tensor(truth), torch.tensor(accepted))
    found, strict = metrics.scores(), scores(truth, answers, 5)
    assert found["any_of_accuracy"] == pytest.approx(np.mean([answer in own for own, answer in notes]))
    assert found["several_labels"] == sum(len(own) > 1 for own, _ in notes)
    assert found["any_of_accuracy"] >= found["accuracy"]
    unlike = {"any_of_accuracy", "several_labels", "per_class"}
    assert {k: v for k, v in found.items() if k not in unlike} == {k: v for k, v in strict.items() if k not in unlike}
    assert [*found["per_class"].values()] == [*strict["per_class"].values()], "the first label counts there"
    assert strict["any_of_accuracy"] == strict["accuracy"]


def test_results_have_the_probabilities_that_float32_rounds_to_0() -> None:
    note = TokenisedNote(row=0, id="a", text_hash="f0", input_ids=[1, 2], cut_tokens=0, specialty="Urology")
    nats, names = torch.tensor([[0.0, -200.0]]), ("Neurology", "Urology")
    batch = Collator(lambda _: [3], 0, label_names=names).evaluate([note])
    answers = Answers(torch.tensor([0]), [names[0]], nats.softmax(dim=1), nats)
    found = batch_results(batch, batch.accepted, answers, LabelSet(names)).probabilities
    assert found is not None
    assert np.log(found) == pytest.approx(nats.numpy())
