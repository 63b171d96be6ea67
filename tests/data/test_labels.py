"""Properties of labels: spellings that mean the same are the same, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medlit.data.labels import LabelSet, normalise_label, normalise_text
from medlit.errors import UserError

NAMES = [
    "Cardiovascular / Pulmonary",
    "ENT - Otolaryngology",
    "Hematology - Oncology",
    "Neurology",
    "Neurosurgery",
    "Obstetrics / Gynecology",
]
SET = LabelSet.from_names(NAMES)
KEYS = {normalise_label(name) for name in NAMES}
SPACE = st.text(" \t\u00a0\u2003", max_size=3)


@st.composite
def spellings(draw: st.DrawFn, name: str) -> str:
    """Any way to write a label that the recipe's normalisation makes equal."""
    out = draw(SPACE)
    for part in name.replace(" / ", "/").replace(" - ", "/").split("/"):
        if out.strip():
            out += draw(SPACE) + draw(st.sampled_from("/-")) + draw(SPACE)
        out += "".join(draw(st.sampled_from([char.lower(), char.upper()])) for char in part)
    return out + draw(SPACE)


@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise_label(normalise_label(text)) == normalise_label(text)
    assert normalise_text(normalise_text(text)) == normalise_text(text)


@given(st.data())
def test_every_spelling_of_a_label_is_that_label(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    spelling = data.draw(spellings(name))
    assert SET.index(spelling) == SET.names.index(name) == SET.parse(spelling)


@given(st.data(), st.text())
def test_only_the_first_line_of_an_answer_counts(data: st.DataObject, rest: str) -> None:
    name = data.draw(st.sampled_from(NAMES))
    assert SET.parse(f"{data.draw(spellings(name))}\n{rest}") == SET.names.index(name)
    assert SET.parse(f"\n\n {name}\n{rest}") == SET.names.index(name)
    assert SET.parse(f"It is\n{name}") == SET.invalid


@given(st.text().filter(lambda text: normalise_label((text.strip().splitlines() or [""])[0]) not in KEYS))
def test_everything_else_is_invalid(answer: str) -> None:
    assert SET.parse(answer) == SET.invalid == len(NAMES)


@pytest.mark.parametrize("answer", ["", " \n", "Neuro", "Neurology.", "Neurology or Neurosurgery", "Urology", "ENT"])
def test_near_misses_are_invalid(answer: str) -> None:
    assert SET.parse(answer) == SET.invalid
    assert SET.index(answer) is None


@given(st.one_of(st.text(), st.sampled_from(NAMES).flatmap(lambda n: st.text(max_size=3).map(n.__add__))))
def test_any_answer_is_a_label_or_invalid(answer: str) -> None:
    label = SET.parse(answer)
    assert 0 <= label <= SET.invalid
    first = (answer.strip().splitlines() or [""])[0]
    assert (label < SET.invalid) == (SET.index(first) is not None)


@given(st.permutations(NAMES))
def test_the_order_of_the_names_does_not_matter(names: list[str]) -> None:
    assert LabelSet.from_names(names) == SET
    assert list(SET) == sorted(NAMES)


def test_the_most_frequent_spelling_is_used() -> None:
    labels = [
        "ent - otolaryngology",
        "ENT - Otolaryngology",
        "Neurology ",
        "ENT  -  Otolaryngology",
        " ENT-Otolaryngology",
    ]
    assert LabelSet.from_labels(labels).names == ("ENT - Otolaryngology", "Neurology")
    assert LabelSet.from_labels(reversed(labels)) == LabelSet.from_labels(labels)


@pytest.mark.parametrize("labels", [["Neurology", " neurology "], ["Neurology"], []])
def test_one_class_is_refused(labels: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.columns\.label.*at least two labels"):
        LabelSet.from_labels(labels)


@pytest.mark.parametrize("names", [["A/B", "a - b", "C"], ["Neurology", ""], ["Neurology", " "]])
def test_names_that_are_the_same_or_empty_are_refused(names: list[str]) -> None:
    with pytest.raises(UserError, match="distinct and not empty"):
        LabelSet.from_names(names)


# --- an answer that is not finished yet -------------------------------------------------------------------------------

# What is odd about spellings: marks and white space, line ends, letters whose lower case hangs on what follows.
MARKS = ["-", " - ", "/", " /", " ", "\t", "\n", "\r\n", "\x1c", "\u2028", "\xa0", "\ufffd"]
LETTERS = ["\N{LATIN SMALL LETTER E WITH ACUTE}", "\N{GREEK CAPITAL LETTER SIGMA}", "\N{GREEK CAPITAL LETTER ALPHA}"]
WORDS = ["\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}", "neuro", "NEURO", "logy", "Logy", "surgery", "e", "A", "a"]
PIECES = st.sampled_from([*MARKS, *LETTERS, *WORDS])
WRITTEN = st.lists(PIECES, max_size=6).map("".join)


@st.composite
def label_sets(draw: st.DrawFn) -> LabelSet:
    names = {normalise_label(name): name for name in draw(st.lists(WRITTEN, min_size=2, max_size=5))}
    return LabelSet(tuple(name for key, name in sorted(names.items()) if key))


@given(label_sets(), WRITTEN, WRITTEN)
def test_settled_answers_stay_settled(labels: LabelSet, begun: str, rest: str) -> None:
    if labels.settled(begun):
        assert labels.parse(begun + rest) == labels.parse(begun)
        assert labels.settled(begun + rest)


@given(label_sets(), st.data())
def test_no_beginning_of_a_label_is_settled(labels: LabelSet, data: st.DataObject) -> None:
    for name in labels:
        spelling = " ".join(name.split())
        begun = spelling[: data.draw(st.integers(0, len(spelling)))]
        assert not labels.settled(begun)
        assert not labels.settled(f" \n{begun}")


@given(label_sets(), st.text("neurolgy a-/", max_size=8))
def test_unsettled_answers_can_still_become_a_label(labels: LabelSet, begun: str) -> None:
    keys = [normalise_label(name) for name in labels]
    rests = [join + key[i:] for key in keys for i in range(len(key) + 1) for join in ("", " ", "/")]
    if keys and not labels.settled(begun) and not any("\ufffd" in key for key in keys):
        assert any(labels.parse(begun + rest) != labels.invalid for rest in rests)


@pytest.mark.parametrize(
    ("text", "over"),
    [
        ("", False),
        ("\n ", False),
        ("Neuro", False),
        ("Neurology", False),
        ("NEUROLOGY ", False),
        ("hematology -", False),
        ("Hematology  ", False),
        ("Neuro ", True),
        ("Neurology\n", True),
        ("Neurology.", True),
        ("The", True),
    ],
)
def test_settled(text: str, over: bool) -> None:
    assert SET.settled(text) is over


def test_without_labels_nothing_is_ever_settled() -> None:
    assert not LabelSet(()).settled("anything at all\n")
