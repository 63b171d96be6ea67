"""Splits: whole text groups, stratified, every row accounted for, the same in any order; weights record theirs."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medlit.data.notes import CANONICAL, hash_text
from medlit.data.settings import LabelConflicts, Split
from medlit.data.splits import DataFingerprint, split_notes
from medlit.data.stratified_split import (
    CONFLICT,
    DUPLICATE,
    LEAKED,
    Assignment,
    assign,
    resolve_kind,
    stratified_group_split,
)
from medlit.errors import UserError

PINNED = "tr tr va tr tr te tr tr tr tr tr tr tr tr te tr tr tr tr va"
KEPT = ("train", "validation", "test")

# A pool: each note a (text number, label); numbers recur, so texts do, with one label or several.
NOTES = st.lists(st.tuples(st.integers(0, 25), st.sampled_from("abc")), min_size=1, max_size=60)
CONFLICTS = st.sampled_from(["keep", "drop", "majority", "merge"])
POOLED = st.one_of(
    st.builds(Split, kind=st.just("grouped"), seed=st.integers(0, 99)),
    st.builds(Split, kind=st.just("kfold"), fold=st.integers(0, 4)),
)
SHARES = st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.7, 0.3, 0.0), (0.2,) * 5])


def assign_notes(
    notes: list[tuple[int, str]],
    chosen: Split,
    given: list[str] | None = None,
    near: int = 1,
    conflicts: LabelConflicts = "keep",
) -> dict[str, tuple[str, str, str]]:
    """Id -> (split, text hash, label); `near` neighbouring text numbers make one group."""
    ids = [f"n{row}" for row in range(len(notes))]
    return _assigned(ids, notes, chosen, given or ["all"] * len(notes), near, conflicts)


def _assigned(
    ids: list[str],
    notes: list[tuple[int, str]],
    chosen: Split,
    given: list[str],
    near: int,
    conflicts: LabelConflicts,
) -> dict[str, tuple[str, str, str]]:
    hashes = [hash_text(f"text {text}") for text, _ in notes]
    groups = [text // near for text, _ in notes]
    result: Assignment = assign(given, ids, hashes, [(label,) for _, label in notes], groups, chosen, conflicts)
    rows = zip(result.split, hashes, [";".join(labels) for labels in result.specialties], strict=True)
    return dict(zip(ids, rows, strict=True))


def table(rows: list[tuple[str, str, str]]) -> datasets.Dataset:
    """Canonical rows of (id, text, label)."""
    columns = [[row[place] for row in rows] for place in range(3)]
    return datasets.Dataset.from_dict(
        dict(zip(CANONICAL, [*columns, [*map(hash_text, columns[1])], [[name] for name in columns[2]]], strict=True))
    )


@given(notes=NOTES, chosen=POOLED, near=st.integers(1, 3), conflicts=CONFLICTS)
def test_no_text_group_is_in_two_splits(
    notes: list[tuple[int, str]], chosen: Split, near: int, conflicts: LabelConflicts
) -> None:
    splits: dict[int, set[str]] = {}
    result = assign_notes(notes, chosen, near=near, conflicts=conflicts)
    for (split, _, _), (text, _) in zip(result.values(), notes, strict=True):
        if split in KEPT:
            splits.setdefault(text // near, set()).add(split)
    assert all(len(found) == 1 for found in splits.values())


@given(notes=NOTES, chosen=POOLED, conflicts=CONFLICTS)
def test_every_row_is_accounted_for(notes: list[tuple[int, str]], chosen: Split, conflicts: LabelConflicts) -> None:
    result = assign_notes(notes, chosen, conflicts=conflicts)
    labels: dict[int, set[str]] = {}
    for text, label in notes:
        labels.setdefault(text, set()).add(label)
    conflicting = {text for text, found in labels.items() if len(found) > 1}

    for (split, _, _), (text, _) in zip(result.values(), notes, strict=True):
        assert split in {*KEPT, DUPLICATE, CONFLICT}
        assert (split == CONFLICT) == (conflicts == "drop" and text in conflicting)
    kept = Counter(row[1:] for row in result.values() if row[0] in KEPT)
    assert set(kept.values()) <= {1}  # each text once with each of its labels
    texts = {hash_text(f"text {text}") for text in labels if conflicts != "drop" or text not in conflicting}
    assert {text for text, _ in kept} == texts
    if conflicts in ("majority", "merge"):
        assert len(kept) == len(texts)


@given(notes=NOTES, given=st.lists(st.sampled_from(KEPT), min_size=60, max_size=60), pooled=st.booleans())
def test_merged_notes_have_all_labels_of_their_text_once(
    notes: list[tuple[int, str]], given: list[str], pooled: bool
) -> None:
    chosen = Split("grouped") if pooled else Split("official")
    result = assign_notes(notes, chosen, given[: len(notes)], conflicts="merge")
    labels: dict[tuple[str, int], list[str]] = {}
    for (text, label), where in zip(notes, given, strict=False):
        labels.setdefault(("" if pooled else where, text), []).append(label)
    merged = {
        ("" if pooled else split, text): found.split(";")
        for (split, _, found), (text, _) in zip(result.values(), notes, strict=True)
        if split in KEPT
    }
    assert sum(split in KEPT for split, _, _ in result.values()) == len(merged)
    assert {key: set(found) for key, found in merged.items()} == {key: set(found) for key, found in labels.items()}
    first = {key: found[0] for key, found in labels.items()} if len(notes) <= 10 else {}  # ids sort as rows do
    assert all(merged[key][0] == label for key, label in first.items())
    assert all(len(found) == len(set(found)) for found in merged.values())


@given(notes=NOTES, chosen=POOLED, order=st.randoms(use_true_random=False), near=st.integers(1, 3), conflicts=CONFLICTS)
def test_the_order_of_rows_does_not_matter(
    notes: list[tuple[int, str]], chosen: Split, order: random.Random, near: int, conflicts: LabelConflicts
) -> None:
    ids = [f"n{row}" for row in range(len(notes))]
    places = list(range(len(notes)))
    order.shuffle(places)
    shuffled = _assigned(
        [ids[place] for place in places],
        [notes[place] for place in places],
        chosen,
        ["all"] * len(notes),
        near,
        conflicts,
    )
    assert shuffled == assign_notes(notes, chosen, near=near, conflicts=conflicts)


@given(
    notes=st.lists(st.tuples(st.integers(0, 9), st.sets(st.sampled_from("abcd"), min_size=1)), min_size=1, max_size=40),
    chosen=POOLED,
    order=st.randoms(use_true_random=False),
    conflicts=CONFLICTS,
)
def test_the_order_of_a_note_s_labels_does_not_matter(
    notes: list[tuple[int, set[str]]], chosen: Split, order: random.Random, conflicts: LabelConflicts
) -> None:
    ids, texts = [f"n{row}" for row in range(len(notes))], [f"text {text}" for text, _ in notes]

    def assigned(labels: list[tuple[str, ...]]) -> list[tuple[str, frozenset[str]]]:
        result = assign(["all"] * len(ids), ids, texts, labels, [text for text, _ in notes], chosen, conflicts)
        return list(zip(result.split, map(frozenset, result.specialties), strict=True))

    written = [tuple(sorted(names)) for _, names in notes]
    assert assigned([tuple(order.sample(names, len(names))) for names in written]) == assigned(written)


@given(counts=st.lists(st.sampled_from("abcd"), min_size=1, max_size=120), shares=SHARES, seed=st.integers(0, 9))
def test_single_rows_are_stratified_within_one_row(counts: list[str], shares: tuple[float, ...], seed: int) -> None:
    groups = {hash_text(str(row)): {label: 1} for row, label in enumerate(counts)}
    dealt = stratified_group_split(groups, shares, seed)
    found = Counter((label, dealt[hash_text(str(row))]) for row, label in enumerate(counts))
    for label, total in Counter(counts).items():
        for part, share in enumerate(shares):
            assert abs(found[label, part] - share * total) < 1 + 1e-9


@given(sizes=st.lists(st.integers(2, 6), max_size=15), seed=st.integers(0, 9))
def test_groups_of_several_rows_are_stratified_where_single_rows_suffice(sizes: list[int], seed: int) -> None:
    groups = {f"g{place}": {"a": size} for place, size in enumerate(sizes)}
    groups |= {f"s{place}": {"a": 1} for place in range(10 + 2 * sum(sizes))}
    dealt = stratified_group_split(groups, (0.5, 0.25, 0.25), seed)
    total = sum(count["a"] for count in groups.values())
    for part, share in enumerate((0.5, 0.25, 0.25)):
        found = sum(groups[key]["a"] for key in groups if dealt[key] == part)
        assert abs(found - share * total) < 1 + 1e-9


def test_large_groups_do_not_all_go_to_training() -> None:
    groups = {f"g{place}": {"a": 4} for place in range(20)} | {f"s{place}": {"a": 1} for place in range(20)}
    dealt = stratified_group_split(groups, (0.8, 0.1, 0.1), seed=3407)
    assert {dealt[key] for key in groups if key.startswith("g")} == {0, 1, 2}


def test_seed_changes_the_split_and_nothing_else_does() -> None:
    notes = [(text, "ab"[text % 2]) for text in range(100)]
    one, two = (assign_notes(notes, Split("grouped", seed=seed)) for seed in (1, 2))
    assert one != two
    assert Counter(row[0] for row in one.values()) == Counter(row[0] for row in two.values())


def test_the_split_is_the_same_on_every_machine() -> None:
    # Written down once: whatever changes it changes the split of every table that was ever split.
    notes = [(text, "ab"[text % 2]) for text in range(20)]
    splits = [row[0][:2] for row in assign_notes(notes, Split("grouped")).values()]

    assert " ".join(splits) == PINNED


@given(notes=NOTES, cut=st.tuples(st.integers(0, 60), st.integers(0, 60)))
def test_official_is_as_given_and_clean_leaves_out_leaked_training_rows(
    notes: list[tuple[int, str]], cut: tuple[int, int]
) -> None:
    low, high = sorted(cut)
    given = ["train" if row < low else "validation" if row < high else "test" for row in range(len(notes))]
    official = assign_notes(notes, Split("official"), given, near=2)
    assert [row[0] for row in official.values()] == given
    if "train" not in given or len(set(given)) == 1:
        return
    clean = assign_notes(notes, Split("official_clean"), given, near=2)
    held_out = {text // 2 for (text, _), split in zip(notes, given, strict=True) if split != "train"}
    for (split, _, _), (text, _), before in zip(clean.values(), notes, given, strict=True):
        assert split == (LEAKED if before == "train" and text // 2 in held_out else before)


def test_kfold_tests_each_row_once() -> None:
    notes = [(text, "abc"[text % 3]) for text in range(47)]
    folds = [assign_notes(notes, Split("kfold", folds=4, fold=fold)) for fold in range(4)]
    tests = [{name for name, row in fold.items() if row[0] == "test"} for fold in folds]
    validations = [{name for name, row in fold.items() if row[0] == "validation"} for fold in folds]

    assert sorted(name for part in tests for name in part) == sorted(f"n{row}" for row in range(47))
    assert validations == [*tests[1:], tests[0]]
    assert max(map(len, tests)) - min(map(len, tests)) <= 3


def test_auto_is_official_with_splits_and_grouped_without() -> None:
    notes = [(text, "ab"[text % 2]) for text in range(40)]
    given = ["train"] * 30 + ["test"] * 10
    filled = assign_notes(notes, Split(), given)

    assert Counter(row[0] for row in filled.values()) == {"train": 27, "validation": 3, "test": 10}
    assert all(filled[f"n{row}"][0] == "test" for row in range(30, 40))
    assert assign_notes(notes, Split()) == assign_notes(notes, Split("grouped"))
    assert assign_notes(notes, Split(), ["test"] * 40)["n0"][0] == "test"


@pytest.mark.parametrize(
    ("conflicts", "splits", "labels"),
    [
        ("keep", ["train"] * 4 + ["test"], "aabca"),
        ("drop", [CONFLICT] * 3 + ["train", "test"], "aabca"),
        ("majority", ["train"] * 4 + ["test"], "aaaca"),
    ],
)
def test_conflicts_of_an_official_split(conflicts: LabelConflicts, splits: list[str], labels: str) -> None:
    notes = [(1, "a"), (1, "a"), (1, "b"), (2, "c"), (2, "a")]  # text 2 has two labels, but in two splits
    result = assign_notes(notes, Split("official"), ["train"] * 4 + ["test"], conflicts=conflicts)

    assert [row[0] for row in result.values()] == splits
    assert "".join(row[2] for row in result.values()) == labels


@pytest.mark.parametrize(
    ("chosen", "key"),
    [
        ({"shares": (0.8, 0.1)}, "data.split.shares"),
        ({"shares": (0.8, 0.3, 0.1)}, "data.split.shares"),
        ({"shares": (0.0, 0.5, 0.5)}, "data.split.shares"),
        ({"folds": 2}, "data.split.fold"),
        ({"fold": 5}, "data.split.fold"),
        ({"near_threshold": 0.0}, "data.split.near_threshold"),
        ({"near_threshold": 80.0}, "data.split.near_threshold"),
    ],
)
def test_invalid_settings_are_refused(chosen: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=key):
        Split(**chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "given"), [("official", ["all"]), ("official_clean", ["all"]), ("official_clean", ["train"])]
)
def test_official_splits_that_the_source_lacks_are_refused(kind: str, given: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.split"):
        resolve_kind(Split(kind), given)  # type: ignore[arg-type]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


# --- on tables --------------------------------------------------------------------------------------------------------

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"


def test_notes_are_split_in_source_order_and_recorded() -> None:
    pool = table([(f"n{row}", f"text {row}", "ab"[row % 2]) for row in range(40)])
    result = split_notes({"all": pool}, Split("grouped"))
    record = result.record.to_pydict()

    assert list(record) == ["id", "split", "text_hash"]
    assert record["id"] == pool["id"][:]
    for split, rows in result.notes.items():
        assert rows["id"][:] == [
            name for name, where in zip(record["id"], record["split"], strict=True) if where == split
        ]
        assert tuple(rows.column_names) == CANONICAL


def test_hashes_change_with_the_rows_and_not_with_their_order() -> None:
    rows = [(f"n{row}", f"text {row}", "ab"[row % 2]) for row in range(40)]
    first = split_notes({"all": table(rows)}, Split("grouped")).hashes
    assert split_notes({"all": table(rows[::-1])}, Split("grouped")).hashes == first
    relabelled = [(name, text, "c" if name == "n0" else label) for name, text, label in rows]
    assert split_notes({"all": table(relabelled)}, Split("grouped")).hashes != first


def test_nearly_equal_texts_leak_where_a_threshold_is_set() -> None:
    tables = {
        "train": table([("n1", LONG, "a"), ("n2", "something else entirely", "b")]),
        "test": table([("n3", f"{LONG} eighteen", "a")]),
    }
    exact = split_notes(tables, Split("official_clean")).notes
    near = split_notes(tables, Split("official_clean", near_threshold=0.8)).notes

    assert exact["train"]["id"][:] == ["n1", "n2"]
    assert near["train"]["id"][:] == ["n2"]


def test_nearly_equal_texts_stay_together_where_a_split_is_taken_from_train() -> None:
    words = [[f"w{i}x{j}" for j in range(40)] for i in range(20)]
    pairs = [(f"n{i}{end}", " ".join([*text, end]), "ab"[i % 2]) for i, text in enumerate(words) for end in ("p", "q")]
    tables = {"train": table(pairs), "test": table([("t", "something else entirely", "a")])}
    notes = split_notes(tables, Split("auto", near_threshold=0.8)).notes
    drawn = {name[:-1] for name in notes["validation"]["id"][:]}
    assert len(notes["validation"]) == 2 * len(drawn) > 0
    assert drawn.isdisjoint(name[:-1] for name in notes["train"]["id"][:])


def test_pooled_splits_get_distinct_ids() -> None:
    tables = {split: table([("0", f"{split} text", "a")]) for split in ("train", "test")}
    record = split_notes(tables, Split("grouped")).record
    assert record["id"].to_pylist() == ["train/0", "test/0"]


def test_majority_labels_reach_the_notes() -> None:
    rows = [("n1", "same", "b"), ("n2", "same", "a"), ("n3", "same", "b"), ("n4", "other", "a")]
    notes = split_notes({"all": table(rows)}, Split("grouped", shares=(1.0, 0.0, 0.0)), "majority").notes

    assert list(notes) == ["train"]
    assert dict(zip(notes["train"]["id"], notes["train"]["specialty"], strict=True)) == {"n1": "b", "n4": "a"}


def test_merged_labels_reach_the_notes_and_their_hashes() -> None:
    rows = [("n1", "same", "b"), ("n2", "same", "a"), ("n3", "same", "c"), ("n4", "same", "c"), ("n5", "other", "a")]
    one = Split("grouped", shares=(1.0, 0.0, 0.0))
    merged = split_notes({"all": table(rows)}, one, "merge")
    notes = merged.notes["train"]

    assert notes["id"][:] == ["n1", "n5"]
    assert notes["specialty"][:] == ["b", "a"]
    assert notes["specialties"][:] == [["b", "c", "a"], ["a"]]
    assert merged.assignment.split == ["train", *[DUPLICATE] * 3, "train"]
    assert merged.label_set("x").names == ("a", "b", "c")
    again = split_notes({"all": table([rows[0], rows[2], rows[4]])}, one, "merge").hashes
    assert merged.hashes["train"] != again["train"]
    alone = [rows[0], rows[4]]
    assert split_notes({"all": table(alone)}, one, "merge").hashes == split_notes({"all": table(alone)}, one).hashes


@pytest.mark.parametrize(("conflicts", "many"), [(0, False), (1, False), (2, True)])
def test_a_table_full_of_texts_with_several_labels_is_named_once(
    conflicts: int, many: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"n{row}", f"text {row}", "a") for row in range(20)]
    rows += [(f"m{row}", f"text {row}", "b") for row in range(conflicts)]
    split_notes({"all": table(rows)}, Split("grouped")).warn_if_ambiguous()
    sentence = capsys.readouterr().err

    assert bool(sentence) == many
    if many:
        assert sentence.startswith("medlit: data.label_conflicts: 2 of 20 texts carry several labels")
        assert "right for 90.9% of the rows at most; set it to merge" in sentence


def test_the_order_of_a_note_s_labels_makes_no_conflict(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table([(f"n{row}", f"text {row // 2}", "ab"[row % 2]) for row in range(20)]).remove_columns("specialties")
    rows = rows.add_column("specialties", [["a", "b"], ["b", "a"]] * 10)  # type: ignore[call-arg, arg-type]
    split_notes({"all": rows}, Split("grouped")).warn_if_ambiguous()
    assert capsys.readouterr().err == ""


def test_a_split_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = table([(f"n{row}", f"text {row}", "ab"[row % 2]) for row in range(40)])
    first = split_notes({"all": pool}, Split("grouped", seed=8))
    monkeypatch.setattr("medlit.data.splits.assign", None)

    assert split_notes({"all": pool}, Split("grouped", seed=8)).hashes == first.hashes


THEN = DataFingerprint("clinic/notes", "a" * 40, {"train": "11", "validation": "22", "test": "33"})


def test_a_fingerprint_survives_a_checkpoint_and_an_adapter() -> None:
    assert DataFingerprint.from_dict(json.loads(json.dumps(asdict(THEN)))) == THEN


@pytest.mark.parametrize("values", [None, {}, [], {"source": "x"}, asdict(THEN) | {"more": 1}])
def test_weights_of_other_tools_have_none(values: Any) -> None:  # noqa: ANN401 - whatever a file may hold
    assert DataFingerprint.from_dict(values) is None


@pytest.mark.parametrize(
    "damage",
    [{"hashes": None}, {"hashes": ["11"]}, {"hashes": {"train": 11}}, {"source": 3}, {"revision": ["a"]}],
    ids=str,
)
def test_a_corrupt_fingerprint_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the stored data fingerprint is corrupt"):
        DataFingerprint.from_dict(asdict(THEN) | damage)


def test_the_same_notes_from_another_place_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    replace(THEN, source="notes.csv", revision=None).warn_if_different(THEN, "it")
    THEN.warn_if_different(None, "weights of another tool")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("hashes", "message"),
    [
        ({"test": "44"}, "the test split is not what it was trained with"),
        ({"train": "44", "test": "44"}, "the train and test splits are not"),
        ({"train": "4", "validation": "4", "test": "4"}, "the train, validation and test splits are not"),
    ],
)
def test_the_splits_that_differ_are_named(
    hashes: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(THEN, hashes=THEN.hashes | hashes).warn_if_different(THEN, "it")
    difference = capsys.readouterr().err
    assert message in difference
    assert "clinic/notes at aaaa" in difference
    assert difference.count(".") == 1, "one sentence"


def test_a_split_that_is_no_longer_there_differs_and_another_source_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = DataFingerprint("notes.csv", None, {"train": "11", "validation": "22"})
    now.warn_if_different(THEN, "it")
    difference = capsys.readouterr().err
    assert "the test split is" in difference
    assert f"data.source was clinic/notes at {'a' * 40} and is notes.csv" in difference
