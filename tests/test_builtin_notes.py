"""Properties of the invented notes: seeded, balanced, never twice, disjoint between splits, learnable, not trivial."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import builtin_notes as builtin
import pytest
from builtin_notes import PHRASES, SPECIALTIES, builtin_notes

from medlit.errors import UserError

Notes = dict[str, list[dict[str, str]]]

SPLITS = ("train", "validation", "test")
DEFAULT_SHA256 = "1a29626dd643be7ead380fab8f3b6be385df0e3081f9e314facde80cfdd081b0"
HEADING = re.compile(r"(?:^|[ ,])[A-Z][A-Z ]+: ,? ?")
SLOT = re.compile(r"\{[^{}]*\}")
WORD = re.compile(r"[a-z0-9]+")
# Stricter than the label's words: no note of any specialty may hold the stem of any label's word.
STEMS = re.compile(
    r"cardiovasc|pulmon|orthoped|neurolog|neurosurg|gastroenter|obstetr|gynecol|hematolog|oncolog|\bent\b|otolaryng|"
    r"nephrolog|psychiatr|psycholog|ophthalmo|pediatr|neonat|radiolog",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def notes() -> Notes:
    return builtin_notes()


def column(rows: list[dict[str, str]], name: str) -> list[str]:
    return [row[name] for row in rows]


def phrases(split: str) -> Iterator[str]:
    """Every phrase of a split's pool, generic lines and plans included."""
    for pools in PHRASES["specialties"].values():
        for line in pools[split].splitlines():
            yield from line.strip().split("; ")
    for lines in PHRASES["lines"][split].values():
        yield from lines


def word_runs(phrase: str, length: int) -> set[tuple[str, ...]]:
    """The runs of `length` literal words in a phrase; a slot breaks a run."""
    pieces = [WORD.findall(piece.lower()) for piece in SLOT.split(phrase)]
    return {tuple(words[i : i + length]) for words in pieces for i in range(len(words) - length + 1)}


def section_shapes(rows: list[dict[str, str]]) -> set[str]:
    """What stands under the headings, numbers masked: the trace that a phrase leaves in the finished notes."""
    bodies = (body for row in rows for body in HEADING.split(row["transcription"]) if body)
    return {re.sub(r"\d+(\.\d+)?", "#", body).strip(" .,").lower() for body in bodies}


def test_the_default_rows_are_pinned_to_the_byte(notes: Notes) -> None:
    canonical = json.dumps(notes, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert hashlib.sha256(canonical.encode()).hexdigest() == DEFAULT_SHA256


def test_the_package_ships_what_the_generator_writes(tmp_path: Path) -> None:
    builtin.write_notes(tmp_path)
    for split in SPLITS:
        assert (builtin.FOLDER / f"{split}.csv").read_bytes() == (tmp_path / f"{split}.csv").read_bytes()


def test_rows_have_the_requested_shape(notes: Notes) -> None:
    assert {split: len(rows) for split, rows in notes.items()} == {"train": 650, "validation": 65, "test": 143}
    rows = [row for split in SPLITS for row in notes[split]]
    assert all(list(row) == ["id", "transcription", "medical_specialty"] for row in rows)
    assert len(set(column(rows, "id"))) == len(rows)


def test_another_seed_gives_other_notes(notes: Notes) -> None:
    texts = {text for rows in notes.values() for text in column(rows, "transcription")}
    others = {text for rows in builtin_notes(seed=1).values() for text in column(rows, "transcription")}
    assert len(texts & others) < 0.02 * len(texts)


def test_fewer_notes_are_the_first_of_more(notes: Notes) -> None:
    small = builtin_notes(train=40, validation=0, test=20)
    assert small["train"] == notes["train"][:40]
    assert small["validation"] == []
    assert small["test"] == notes["test"][:20]


@pytest.mark.parametrize("sizes", [(650, 65, 143), (20, 7, 14), (0, 0, 1)])
def test_specialties_are_balanced_within_one_note(sizes: tuple[int, int, int]) -> None:
    for rows in builtin_notes(5, *sizes).values():
        counts = Counter(column(rows, "medical_specialty"))
        each = [counts[name] for name in SPECIALTIES]
        assert max(each) - min(each) <= 1
        assert sum(each) == len(rows)


@pytest.mark.parametrize("seed", [3407, 0, 1])
def test_no_text_occurs_twice(seed: int) -> None:
    texts = [" ".join(text.split()) for rows in builtin_notes(seed).values() for text in column(rows, "transcription")]
    assert len(set(texts)) == len(texts)


def test_no_note_holds_a_word_of_a_label() -> None:
    words = {word for name in SPECIALTIES for word in WORD.findall(name.lower())}
    for rows in builtin_notes(train=5000, validation=2000, test=2000).values():
        for row in rows:
            assert not words & set(WORD.findall(row["transcription"].lower())), row["id"]
            assert not STEMS.search(row["transcription"]), row["id"]


def test_no_phrase_stands_in_two_pools() -> None:
    pools = {split: {phrase.lower() for phrase in phrases(split)} for split in SPLITS}
    runs = {split: {run for phrase in pools[split] for run in word_runs(phrase, 4)} for split in SPLITS}
    for one, other in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert not pools[one] & pools[other]
        assert not runs[one] & runs[other]  # nor with a few words changed


def test_no_section_of_a_note_stands_in_two_splits() -> None:
    notes = builtin_notes(train=5000, validation=2000, test=2000)
    shapes = {split: section_shapes(notes[split]) for split in SPLITS}
    assert not shapes["train"] & (shapes["validation"] | shapes["test"])
    assert not shapes["validation"] & shapes["test"]


def test_pools_are_wide_enough() -> None:
    for pools in PHRASES["specialties"].values():
        counts = {split: len(set(re.split(r"; |\n", pools[split].strip()))) for split in SPLITS}
        assert counts["train"] >= 40
        assert counts["validation"] >= 15
        assert counts["test"] >= 20


def test_notes_are_short_sectioned_and_filled_in(notes: Notes) -> None:
    rows = [row for split in SPLITS for row in notes[split]]
    words = [len(row["transcription"].split()) for row in rows]
    for row in rows:
        text = row["transcription"]
        assert 90 <= len(text) <= 340, row["id"]
        assert len(HEADING.findall(text)) >= 2, row["id"]
        assert not re.search(r"[{}|;]", text), row["id"]
    assert max(words) <= 60
    assert 30 <= sum(words) / len(words) <= 60


def test_bag_of_words_learns_most_but_not_all() -> None:
    scores = [bag_of_words_accuracy(builtin_notes(seed)) for seed in (3407, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)]
    assert min(scores) >= 0.75
    assert max(scores) <= 0.95


def test_shuffled_labels_teach_nothing(notes: Notes) -> None:
    texts, labels = column(notes["train"], "transcription"), column(notes["train"], "medical_specialty")
    # A fixed shuffle: labels in the order of their notes' hashes.
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i].encode()).digest())
    shuffled = [dict(row, medical_specialty=labels[i]) for row, i in zip(notes["train"], order, strict=True)]
    assert bag_of_words_accuracy({"train": shuffled, "test": notes["test"]}) <= 0.2


def bag_of_words_accuracy(notes: Notes) -> float:
    """Test accuracy (0-1) of TF-IDF with logistic regression, fitted on the training rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10, class_weight="balanced", max_iter=1000),
    )
    train, test = notes["train"], notes["test"]
    model.fit(column(train, "transcription"), column(train, "medical_specialty"))
    return float(model.score(column(test, "transcription"), column(test, "medical_specialty")))


def test_a_hundred_thousand_notes_are_all_different() -> None:
    texts = column(builtin_notes(train=100_000, validation=0, test=0)["train"], "transcription")
    assert len(set(texts)) == 100_000


def test_a_negative_size_is_a_user_error() -> None:
    with pytest.raises(UserError, match="test asks for -1 notes"):
        builtin_notes(test=-1)


def test_exhausted_pools_are_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "make_note", lambda rng, specialty, split: f"{split} {specialty}")
    with pytest.raises(UserError, match="ask for fewer train notes"):
        builtin_notes(train=14)
