"""Weights record which notes they come from, and a difference names split and source."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medlit.data.data_fingerprint import DataFingerprint
from medlit.errors import UserError

THEN = DataFingerprint("clinic/notes", "a" * 40, {"train": "11", "validation": "22", "test": "33"})


def test_it_survives_a_checkpoint_and_an_adapter(tmp_path: Path) -> None:
    assert DataFingerprint.from_dict(THEN.to_dict()) == THEN
    (tmp_path / "medlit.json").write_text(json.dumps({"labels": [], "data": THEN.to_dict()}))
    assert DataFingerprint.read(tmp_path / "medlit.json") == THEN


@pytest.mark.parametrize("values", [None, {}, [], {"source": "x"}, THEN.to_dict() | {"more": 1}])
def test_weights_of_other_tools_have_none(values: Any) -> None:  # noqa: ANN401 - whatever a file may hold
    assert DataFingerprint.from_dict(values) is None


@pytest.mark.parametrize(
    "damage",
    [{"hashes": None}, {"hashes": ["11"]}, {"hashes": {"train": 11}}, {"source": 3}, {"revision": ["a"]}],
    ids=str,
)
def test_a_corrupt_fingerprint_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the stored data fingerprint is corrupt"):
        DataFingerprint.from_dict(THEN.to_dict() | damage)


def test_the_same_notes_from_another_place_are_the_same() -> None:
    assert replace(THEN, source="notes.csv", revision=None).difference(THEN, "it") is None


@pytest.mark.parametrize(
    ("hashes", "message"),
    [
        ({"test": "44"}, "the test split is not what it was trained with"),
        ({"train": "44", "test": "44"}, "the train and test splits are not"),
        ({"train": "4", "validation": "4", "test": "4"}, "the train, validation and test splits are not"),
    ],
)
def test_the_splits_that_differ_are_named(hashes: dict[str, str], message: str) -> None:
    difference = replace(THEN, hashes=THEN.hashes | hashes).difference(THEN, "it")
    assert difference is not None
    assert message in difference
    assert "clinic/notes at aaaa" in difference
    assert difference.count(".") == 1, "one sentence"


def test_a_split_that_is_no_longer_there_differs_and_another_source_is_named() -> None:
    now = DataFingerprint("notes.csv", None, {"train": "11", "validation": "22"})
    difference = now.difference(THEN, "it")
    assert difference is not None
    assert "the test split is" in difference
    assert f"data.source was clinic/notes at {'a' * 40} and is notes.csv" in difference
