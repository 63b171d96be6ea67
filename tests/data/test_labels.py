"""Properties of labels: spellings that mean the same are the same, and nothing else is."""

from __future__ import annotations

import unicodedata
from collections import Counter

import pytest
from builtin_notes import SPECIALTIES
from hypothesis import given
from hypothesis import strategies as st

from medlit.data.labels import DROPPED, LabelReview, LabelSet, canonical_spellings, normalise_label, normalise_text
from medlit.data.settings import Labels
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


def label_set(labels: list[str]) -> LabelSet:
    """The labels of a table's rows."""
    spellings = canonical_spellings(Counter(labels), Labels())
    return LabelSet.from_names(sorted({name for name in spellings.values() if name}))


def test_the_most_frequent_spelling_is_used() -> None:
    labels = [
        "ent - otolaryngology",
        "ENT - Otolaryngology",
        "Neurology ",
        "ENT  -  Otolaryngology",
        " ENT-Otolaryngology",
    ]
    assert label_set(labels).names == ("ENT - Otolaryngology", "Neurology")
    assert label_set(labels[::-1]) == label_set(labels)


@pytest.mark.parametrize("labels", [["Neurology", " neurology "], ["Neurology"], []])
def test_one_class_is_refused(labels: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.columns\.label.*at least two labels"):
        label_set(labels)


@pytest.mark.parametrize("names", [["A/B", "a - b", "C"], ["Neurology", ""], ["Neurology", " "]])
def test_names_that_are_the_same_or_empty_are_refused(names: list[str]) -> None:
    with pytest.raises(UserError, match="distinct and not empty"):
        LabelSet.from_names(names)


# --- characters that look alike ---------------------------------------------------------------------------------------

INVISIBLE = ["\u00ad", "\u200b", "\u200c", "\u200d", "\u200e", "\u2060", "\ufeff", "\ufe0f"]
DASHES = ["-", "\u2010", "\u2011", "\u2012", "\u2013", "\u2014", "\u2015", "\u2212", "\ufe63", "\uff0d"]
ACCENTED = ["P\u00e9diatrie", "\u00c4rztliche Notizen", "Ngo\u1ea1i khoa", "\uc2e0\uacbd\uacfc", "Women's Health"]


@given(st.sampled_from([*NAMES, *ACCENTED]), st.data())
def test_labels_that_look_alike_are_the_same(name: str, data: st.DataObject) -> None:
    written = data.draw(st.sampled_from([name, unicodedata.normalize("NFD", name)]))
    written = written.replace("-", data.draw(st.sampled_from(DASHES))).replace("'", "\u2019")
    written = written.replace("/", data.draw(st.sampled_from(["/", "\u2215", "\uff0f"])))
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(written)))
        written = written[:place] + data.draw(st.sampled_from(INVISIBLE)) + written[place:]
    labels = LabelSet.from_names([*NAMES, *ACCENTED])
    assert normalise_label(written) == normalise_label(name)
    assert labels.names[labels.parse(f"\u200b\n{written}\nnext line")] == name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Neurology", "Neurology."),
        ("Ear & Nose", "Ear and Nose"),
        ("P\u00e9diatrie", "Pediatrie"),
        ("Stra\u00dfe", "Strasse"),
        ("Grade 2", "Grade \u00b2"),
        ("EarNose", "Ear Nose"),
        ("HIV+", "HIV-"),
        ("\u0645\u06cc", "\u0645\u064a"),
    ],
)
def test_what_may_mean_a_difference_is_one(one: str, other: str) -> None:
    assert normalise_label(one) != normalise_label(other)


@given(st.text(st.characters(max_codepoint=0x7E)))
def test_ordinary_labels_are_compared_as_the_recipe_does(text: str) -> None:
    recipe = " ".join(text.split()).lower().replace("-", "/")
    while " /" in recipe or "/ " in recipe:
        recipe = recipe.replace(" /", "/").replace("/ ", "/")
    assert normalise_label(text) == recipe


def test_the_spelling_of_most_rows_is_kept_as_it_is_written() -> None:
    composed, decomposed, dashed = "P\u00e9diatrie", "Pe\u0301diatrie", "ENT \u2013 Otolaryngology"
    counts = {composed: 2, decomposed: 3, f"{composed}\u200b": 1, dashed: 2, "ENT - Otolaryngology": 1, "\ufeff": 1}
    spellings = canonical_spellings(counts, Labels())
    assert {spellings[name] for name in counts} == {decomposed, dashed, None}
    equal = dict.fromkeys([composed, decomposed, f"\u200b{composed}", f"{composed}\xad"], 1)
    assert set(canonical_spellings(equal, Labels()).values()) == {composed, None}


def test_aliases_and_drop_are_compared_alike() -> None:
    rules = Labels(aliases={"ENT \u2014 Otolaryngology": "ENT"}, drop=["Pe\u0301diatrie"])
    spellings = canonical_spellings({"ENT - Otolaryngology": 2, "P\u00e9diatrie": 1, "Neurology": 1}, rules)
    assert spellings["ENT - Otolaryngology"] == "ENT"
    assert spellings["P\u00e9diatrie"] == DROPPED


def test_a_rule_for_no_label_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    canonical_spellings({"Cardiology": 3, "Urology": 2}, Labels(drop=["Cardilogy", "urology"]))
    assert capsys.readouterr().err == (
        "medlit: data.labels: no row has the label 'Cardilogy'; did you mean 'Cardiology'?\n"
    )


def test_aliases_that_contradict_each_other_are_refused() -> None:
    same = {"ENT \u2013 Throat": "ENT", "ENT - Throat": "ent "}
    assert canonical_spellings({"ENT-Throat": 1}, Labels(aliases=same))["ENT-Throat"] in ("ENT", "ent")
    with pytest.raises(UserError, match=r"data\.labels\.aliases: .*is given twice, for 'A' and for 'B'; keep one"):
        canonical_spellings({}, Labels(aliases={"ENT \u2013 Throat": "A", "ENT - Throat": "B"}))


def test_weights_that_know_labels_that_look_alike_keep_them_apart() -> None:
    names = ("ENT - Throat", "ENT \u2013 Throat", "P\u00e9diatrie", "Pe\u0301diatrie")
    for labels in (LabelSet(names), LabelSet(names[::-1])):
        assert sorted(LabelSet.from_names(labels.names)) == sorted(names)
        assert [labels.names[labels.parse(name)] for name in names] == list(names)
        assert labels.names[labels.parse("ent \u2013 throat")] == names[1]
        assert labels.index("ENT \u2014 Throat") is not None


@given(st.lists(st.sampled_from([*NAMES, *ACCENTED, "ENT \u2013 X", "ENT Y"]), min_size=2, unique=True))
def test_the_order_of_labels_is_the_recipes(names: list[str]) -> None:
    recipe = sorted(names, key=lambda name: name.lower().replace(" - ", "/").replace(" / ", "/"))
    assert list(LabelSet.from_names(names)) == recipe


# --- what only a person can decide ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frequent", "rare"),
    [
        ("Neurology", "Neurolgy"),
        ("Neurology", "Nuerology"),
        ("Neurology", "Neurology."),
        ("Orthopedic", "Orthopaedic"),
        ("Pediatrics", "pediatric"),
        ("Ear & Nose", "Ear and Nose"),
        ("Obstetrics / Gynecology", "Obstetrics & Gynecology"),
        ("Emergency Medicine", "emergencymedicine"),
        ("P\u00e9diatrie", "Pediatrie"),
        ("Grade 2", "Grade \u00b2"),
        ("General Surgery - Adults", "General Sugery - Adults"),
    ],
)
def test_labels_that_nearly_agree_are_listed(frequent: str, rare: str) -> None:
    assert LabelReview.of([frequent, "Urology", rare]) == LabelReview({rare: frequent}, {}, [])


@pytest.mark.parametrize(
    "names",
    [
        SPECIALTIES,
        ["Neurology", "Neurosurgery", "Urology", "Nephrology", "Cardiology", "Radiology"],
        ["Ward A", "Ward B", "Ward 1", "Ward 2", "Type I", "Type II", "Grade 1.2", "Grade 12"],
        ["E11.1", "E1.11", "E111", "<65", ">65", "HIV+", "HIV"],
        ["Ear, Nose and Throat", "Obstetrics / Gynecology", "Hematology - Oncology", "Oncology", "Hematology"],
        ["Nanotherapy", "Unknown fever", "Missing limb", "None of these wards"],
    ],
)
def test_ordinary_labels_are_not_listed(names: list[str]) -> None:
    assert LabelReview.of(names) == LabelReview({}, {}, [])


@pytest.mark.parametrize(
    "name",
    ["nan", "NaN", "None", "null", "<NA>", "#N/A", "n/a", "NA", "-", "--", "?", "Unknown", "not available", "(none)"],
)
def test_labels_that_stand_for_none_are_listed(name: str) -> None:
    assert LabelReview.of(["Neurology", name]) == LabelReview({}, {}, [name])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Cardiology; Surgery", ["Cardiology", "Surgery"]),
        ("Surgery | neurology", ["Neurology", "Surgery"]),
        ("Neurology, urology", ["Neurology", "Urology"]),
        ("Neurology + Urology", ["Neurology", "Urology"]),
        ("['Surgery', 'Urology']", ["Urology", "Surgery"]),
        ("Ear, Nose; Neurology;", ["Neurology", "Ear, Nose"]),
    ],
)
def test_labels_that_hold_several_are_listed(name: str, parts: list[str]) -> None:
    assert LabelReview.of(["Neurology", "Urology", name]) == LabelReview({}, {name: parts}, [])


@given(order=st.permutations(["Surgery", "Urology", "Neurology", "Ward 3"]), mark=st.sampled_from(["; ", "|"]))
def test_the_order_within_a_label_that_holds_several_does_not_matter(order: list[str], mark: str) -> None:
    name = mark.join(order)
    review = LabelReview.of(["Neurology", "Urology", "Surgery", name])
    assert review.combined == {name: ["Neurology", "Urology", "Surgery", "Ward 3"]}
    assert review.suggested(Labels()).aliases == {name: "Neurology"}


def test_the_suggested_settings_mend_every_label_that_is_listed() -> None:
    counts = {"Neurology": 9, "Surgery": 5, "Neurolgy": 3, "Neurology.": 2, "Sugery; Urology": 2, "Sugery": 2}
    counts |= {"N/A": 2, "nan": 1, "Uro\u200blogy": 2, "Neuro": 1, "Old ward": 1}
    rules = Labels(aliases={"Neuro": "neurolgy"}, drop=["Old Ward"])

    def review(rules: Labels) -> LabelReview:
        spellings = canonical_spellings(counts, rules)
        names = sorted(counts, key=counts.__getitem__, reverse=True)
        return LabelReview.of(list(dict.fromkeys(name for raw in names if (name := spellings[raw]))))

    found = review(rules)
    assert found.similar.keys() == {"Neurolgy", "Neurology.", "Sugery", "Uro\u200blogy"}
    assert found.combined == {"Sugery; Urology": ["Sugery", "Uro\u200blogy"]}
    mended = found.suggested(rules)
    assert review(mended) == LabelReview({}, {}, [])
    meaning = canonical_spellings(counts, mended)
    assert [meaning[name] for name in ("Neuro", "Neurolgy", "Sugery; Urology")] == ["Neurology", "Neurology", "Surgery"]
    assert [meaning[name] for name in ("Old ward", "nan", "Uro\u200blogy")] == [DROPPED, DROPPED, "Urology"]


# --- an answer that is not finished yet -------------------------------------------------------------------------------

# What is odd about spellings: marks and white space, line ends, letters whose lower case hangs on what follows.
MARKS = ["-", " - ", "/", " /", " ", "\t", "\n", "\r\n", "\x1c", "\u2028", "\xa0", "\ufffd"]
# Characters that look like others or like nothing; an acute accent and a dot below, which may follow in any order.
ALIKE = ["\u2013", " \u2212 ", "\u2044", "\u2019", "\xad", "\u200b", "\ufeff", "\u200d", "\u0301", "\u0323"]
LETTERS = ["\N{LATIN SMALL LETTER E WITH ACUTE}", "\N{GREEK CAPITAL LETTER SIGMA}", "\N{GREEK CAPITAL LETTER ALPHA}"]
WORDS = ["\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}", "neuro", "NEURO", "logy", "Logy", "surgery", "e", "A", "a"]
PIECES = st.sampled_from([*MARKS, *ALIKE, *LETTERS, *WORDS])
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
    keys = [unicodedata.normalize("NFD", normalise_label(name)) for name in labels]
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
        ("Neuro\u200b", False),
        ("\u200b\n", False),
        ("hematology \u2013", False),
        ("Hematology \u200b", False),
        ("Neuro\xad \xad", True),
        ("Neurologe\u0301", True),
    ],
)
def test_settled(text: str, over: bool) -> None:
    assert SET.settled(text) is over


def test_an_accent_may_still_follow_its_letter() -> None:
    labels = LabelSet.from_names(["P\u00e9diatrie", "Ngo\u1ea1i khoa", "Urology"])
    for text in ("Pe", "Pe\u0301", "P\u00e9", "Ngo", "Ngoa", "Ngoa\u0323i"):
        assert not labels.settled(text)
    assert labels.settled("Pi")


def test_without_labels_nothing_is_ever_settled() -> None:
    assert not LabelSet(()).settled("anything at all\n")
