"""Properties of labels: spellings that mean the same are the same, and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medlit.errors import UserError
from medlit.labels import LabelSet, normalise_label, normalise_text

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


@given(st.permutations(NAMES))
def test_the_order_of_the_names_does_not_matter(names: list[str]) -> None:
    assert LabelSet.from_names(names) == SET
    assert list(SET) == sorted(NAMES)


def test_of_several_spellings_the_commonest_stands() -> None:
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
    with pytest.raises(UserError, match=r"data\.label_column.*at least two labels"):
        LabelSet.from_labels(labels)


@pytest.mark.parametrize("names", [["A/B", "a - b", "C"], ["Neurology", ""], ["Neurology", " "]])
def test_names_that_are_the_same_or_empty_are_refused(names: list[str]) -> None:
    with pytest.raises(UserError, match="distinct and not empty"):
        LabelSet.from_names(names)
