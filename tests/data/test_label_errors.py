"""Labels dealt at random and labels changed by hand are found; clean notes have none."""

from __future__ import annotations

import random

import numpy as np
import pandas as pd
import pytest
from builtin_notes import builtin_notes

from medlit.data.label_errors import LABELS_CHECKED, confident_joint, cross_fit, label_errors


def frame(labels: list[tuple[str, ...]], texts: list[int] | None = None) -> pd.DataFrame:
    """Notes with these labels, all of different texts unless their numbers are given."""
    notes = pd.DataFrame({"text": texts or range(len(labels))})
    return notes.assign(near=notes["text"], own=labels)


def built_in(size: int = 650) -> tuple[list[str], list[str]]:
    """Texts and labels of clean notes."""
    notes = builtin_notes(train=size)["train"]
    return [note["transcription"] for note in notes], [note["medical_specialty"] for note in notes]


def ids(number: int) -> list[str]:
    return [f"n{row}" for row in range(number)]


def test_the_joint_is_that_of_a_computation_by_hand() -> None:
    scores = np.array([[0.9, 0.1], [0.5, 0.6], [0.2, 0.8], [0.7, 0.6], [0.1, 0.2], [0.8, 0.9]])
    own = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [0, 1], [1, 1]], dtype=bool)
    # Thresholds: (0.9 + 0.5 + 0.8) / 3 = 0.733 and (0.8 + 0.6 + 0.2 + 0.9) / 4 = 0.625.
    # Above them: the first text for 0, the third for 1, and the last for both, of which 1 is more probable.
    placed, counts = confident_joint(scores, own)
    assert placed.astype(int).tolist() == [[1, 0], [0, 0], [0, 1], [0, 0], [0, 0], [0, 1]]
    assert counts.tolist() == [[1, 0], [0, 2]]

    scores[3] = [0.95, 0.6]  # a text of label 1 that is placed under 0
    assert confident_joint(scores, own)[1].tolist() == [[1, 0], [1, 2]]


def test_changed_labels_are_listed_first() -> None:
    texts, labels = built_in()
    draw = random.Random(0)
    changed = dict.fromkeys(draw.sample(range(len(texts)), 30), "")
    for row in changed:
        changed[row] = draw.choice(sorted(set(labels) - {labels[row]}))
    given = [changed.get(row, label) for row, label in enumerate(labels)]
    found = label_errors(frame([(label,) for label in given]), texts, ids(len(texts)))

    assert found is not None
    assert found["texts"] == len(texts)
    first = found["mislabelled"][:15]
    assert {note["id"] for note in first} <= {f"n{row}" for row in changed}
    for note in first:
        row = int(note["id"][1:])
        assert (note["given"], note["suggested"]) == ([changed[row]], labels[row])
        assert 0 <= note["p_given"] < note["p_suggested"] <= 1
    assert label_errors(frame([(label,) for label in labels]), texts, ids(len(texts)))["mislabelled"] == []  # type: ignore[index]


def test_labels_dealt_at_random_are_a_pair_and_their_notes_are_no_errors() -> None:
    texts, labels = built_in(650)
    draw = random.Random(1)
    dealt = [draw.choice(["Heart", "Lung"]) if label.startswith("Cardio") else label for label in labels]
    found = label_errors(frame([(label,) for label in dealt]), texts, ids(len(texts)))

    assert found is not None
    assert [pair["labels"] for pair in found["confused"]] == [["Heart", "Lung"]]
    assert found["confused"][0]["share"] > 0.25
    assert found["mislabelled"] == []
    assert found["agreement"] > 0.8


def test_a_text_may_have_the_label_of_another_row() -> None:
    texts, labels = built_in()
    wrong = "Urology" if labels[0] != "Urology" else "Neurology"
    notes = frame([*((label,) for label in labels), (wrong,)], [*range(len(texts)), 0])
    found = label_errors(notes, [*texts, texts[0]], ids(len(texts) + 1))
    assert found is not None
    assert found["mislabelled"] == []


def test_the_rows_of_a_wrong_text_are_listed_with_their_own_labels() -> None:
    texts, labels = built_in()
    others = sorted(set(labels) - {labels[0]})[:2]
    given = [(others[0],), *((label,) for label in labels[1:]), (others[1],), ()]
    notes = frame(given, [*range(len(texts)), 0, 0])
    found = label_errors(notes, [*texts, texts[0], texts[0]], ids(len(texts) + 2))
    assert found is not None
    listed = {note["id"]: note["given"] for note in found["mislabelled"]}
    assert listed == {"n0": [others[0]], f"n{len(texts)}": [others[1]]}


def test_a_group_is_scored_by_models_that_did_not_see_it() -> None:
    texts = [f"note {place % 10} of ward {'north' if place < 5 else 'south'}" for place in range(20)]
    own = np.array([[place < 5, place >= 5] for place in range(20)])
    together = cross_fit(texts, own, np.array([0] * 5 + [*range(1, 16)]))
    apart = cross_fit(texts, own, np.arange(20))
    assert (together[:5, 0] == 0).all()  # no model that scores them has seen the label
    assert (apart[:5, 0] > 0.5).all()


@pytest.mark.parametrize(
    ("notes", "each"),
    [(40, 1), (40, 2), (2, 2), (1, 50), (0, 0), (400, 3), (LABELS_CHECKED + 1, 10)],
    ids=["one note a label", "two", "two labels of two", "one label", "no notes", "400 labels", "too many labels"],
)
def test_tables_with_too_few_texts_or_too_many_labels_are_left_out(notes: int, each: int) -> None:
    labels = [(f"label {row % notes}",) for row in range(notes * each)]
    assert label_errors(frame(labels), ["a note"] * len(labels), ids(len(labels))) is None


def test_texts_of_signs_and_of_one_word_are_scored() -> None:
    texts = [".", "...", "?", "a", "b", "c", "!", ":", ";", "d"]
    found = label_errors(frame([("xy"[row % 2],) for row in range(10)]), texts, ids(10))
    assert found is not None
    assert found["texts"] == 10


@pytest.mark.parametrize(("most", "is_checked"), [(300, True), (299, False)])
def test_three_texts_a_label_decide_how_many_labels_are_too_many(
    most: int, is_checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medlit.data.label_errors.MOST_PAIRS", most)  # for 10 labels, 30 texts or 29
    labels = [(f"label {row % 10}",) for row in range(45)]
    found = label_errors(frame(labels), [f"note {row}" for row in range(45)], ids(45))
    assert (found is not None) == is_checked


def test_of_a_large_table_evenly_spaced_texts_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medlit.data.label_errors.MOST_PAIRS", 650 * 13 // 2)
    texts, labels = built_in()
    found = label_errors(frame([(label,) for label in labels]), texts, ids(len(texts)))
    assert found is not None
    assert found["texts"] == 325
