"""Text groups: equal texts, and texts whose shingles are as alike as the threshold asks."""

from __future__ import annotations

import io
import itertools
import random
import sys

import datasets
import numpy as np
import pytest
from fakes import AtOnce, Terminal
from hypothesis import given
from hypothesis import strategies as st

from medlit.data.groups import accuracy_ceiling, bands, exact_groups, near_groups, shingles
from medlit.data.notes import hash_text

WORDS = [f"word{number}" for number in range(400)]


def grouped(texts: list[str], threshold: float) -> list[set[str]]:
    """Groups of alike texts, as sets of texts."""
    groups = near_groups(texts, exact_groups([hash_text(text) for text in texts]), threshold)
    found: dict[int, set[str]] = {}
    for text, group in zip(texts, groups.tolist(), strict=True):
        found.setdefault(group, set()).add(text)
    return sorted(found.values(), key=sorted)


def families(seed: int) -> list[str]:
    """Texts of 60 words in families: an original and copies with one word changed, so J is 55 / 61 or more."""
    draw = random.Random(seed)
    texts = []
    for _ in range(12):
        words = draw.choices(WORDS, k=60)
        texts.append(" ".join(words))
        for _ in range(draw.randrange(3)):
            words = list(words)
            words[draw.randrange(60)] = "changed"
            texts.append(" ".join(words))
    return texts


def connected(texts: list[str], threshold: float) -> list[set[str]]:
    """The groups by comparing every pair."""
    groups = [{text} for text in dict.fromkeys(texts)]
    for one, two in itertools.combinations(dict.fromkeys(texts), 2):
        common, every = shingles(one) & shingles(two), shingles(one) | shingles(two)
        if len(common) / len(every) >= threshold:
            left = next(group for group in groups if one in group)
            right = next(group for group in groups if two in group)
            if left is not right:
                left |= right
                groups.remove(right)
    return sorted(groups, key=sorted)


@given(texts=st.lists(st.sampled_from(["a", "b  c", "b c", "b\nc", "d"])))
def test_texts_that_differ_in_white_space_are_one_group(texts: list[str]) -> None:
    groups = exact_groups([hash_text(text) for text in texts])
    for one, two in itertools.combinations(range(len(texts)), 2):
        assert (groups[one] == groups[two]) == (texts[one].split() == texts[two].split())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_near_groups_are_those_of_comparing_every_pair(seed: int, threshold: float) -> None:
    texts = families(seed)
    assert grouped(texts, threshold) == connected(texts, threshold)


def test_the_order_of_texts_does_not_matter() -> None:
    texts = families(seed=0)
    shuffled = random.Random(1).sample(texts, len(texts))
    assert grouped(texts, 0.8) == grouped(shuffled, 0.8)


def test_notes_without_a_word_are_like_no_other() -> None:
    assert len(grouped(["", "?!", "...", "one"], 0.5)) == 4


def test_case_and_punctuation_do_not_tell_texts_apart() -> None:
    assert len(grouped(["Plan: rest, and fluids.", "PLAN rest and fluids"], 1.0)) == 1


def test_nothing_to_compare() -> None:
    assert near_groups([], np.array([], dtype=np.int64), 0.8).tolist() == []


@given(threshold=st.floats(0.05, 1))
def test_a_pair_at_the_threshold_is_hardly_ever_missed(threshold: float) -> None:
    number, rows = bands(threshold)
    assert number * rows <= 128
    assert 1 - (1 - threshold**rows) ** number > 0.99


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.sampled_from("abc"), max_size=3, unique=True))))
def test_no_answers_by_group_are_right_more_often_than_the_ceiling(notes: list[tuple[int, list[str]]]) -> None:
    groups, labels = [group for group, _ in notes], [tuple(own) for _, own in notes]
    labelled = sum(map(bool, labels))
    scores = [
        sum(answers[group] in own for group, own in zip(groups, labels, strict=True)) / max(1, labelled)
        for answers in itertools.product("abc", repeat=4)
    ]
    assert accuracy_ceiling(groups, labels) == pytest.approx(max(scores) if labelled else 1.0)


def test_a_long_search_has_a_bar_on_a_terminal_and_a_line_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medlit.errors.Timer", AtOnce)
    monkeypatch.setattr("medlit.data.groups.SLOW", 0.0)
    texts = families(seed=0)
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    datasets.disable_progress_bars()  # as the command line does there
    grouped(texts, 0.8)
    assert log.getvalue() == f"medlit: searching {len(texts)} texts for near duplicates\n"
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    datasets.enable_progress_bars()
    try:
        grouped(texts, 0.8)
    finally:
        datasets.disable_progress_bars()
    assert "Searching near duplicates: 100%" in terminal.getvalue()
    assert "medlit" not in terminal.getvalue()
