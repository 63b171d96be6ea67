"""Facts about the notes are counted by hand; the report shows counts and hashes, no text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from fakes import notes as forty_notes
from fakes import tiny_datamodule, write_csv

from medlit.data.settings import Split
from medlit.data.splits import DataFingerprint
from medlit.report.systems import data_facts


def notes(*rows: tuple[str, str]) -> Dataset:
    hashes, labels = zip(*rows, strict=True)
    return Dataset.from_dict({"text_hash": hashes, "specialty": labels, "specialties": [[label] for label in labels]})


def test_texts_shared_between_splits_and_conflicts_are_counted() -> None:
    splits = SimpleNamespace(
        notes={
            "train": notes(("a", "Bones"), ("b", "Heart"), ("b", "Heart")),
            "validation": notes(("c", "Heart")),
            "test": notes(("b", "Heart"), ("c", "Heart"), ("d", "Bones"), ("d", "Bones"), ("d", "Heart")),
        },
        kind="kfold",
        seed=1,
        near_threshold=None,
        hashes={"test": "0123"},
        assignment=SimpleNamespace(split=["train", "test", "conflict", "conflict", "duplicate"]),
    )
    split = Split(kind="kfold", seed=1, fold=2)
    facts = data_facts(SimpleNamespace(source="notes.csv", fingerprint=None, mismatch=None, splits=splits, split=split))  # type: ignore[arg-type]
    assert facts == {
        "source": "notes.csv",
        "revision": None,
        "split": "kfold",
        "seed": 1,
        "fold": "2 of 5",
        "near_threshold": None,
        "rows": {"train": 3, "validation": 1, "test": 5},
        "texts": {"train": 2, "validation": 1, "test": 3},
        "hash": {"test": "0123"},
        "classes": {"Bones": [1, 0, 2], "Heart": [2, 1, 3]},
        "test_texts_in_train": 1,
        "test_texts_in_validation": 1,
        "test_conflicts": 3,
        "test_ceiling": 4 / 5,
        "left_out": {"conflict": 2, "duplicate": 1},
    }


def test_all_labels_of_a_note_count_and_not_their_order() -> None:
    own = [["Heart", "Bones"], ["Bones", "Heart"], ["Heart", "Bones"], ["Heart", "Nerves"], ["Bones"]]
    hashes = ["a", "a", "b", "b", "c"]

    def facts(labels: list[list[str]]) -> dict[str, Any]:
        rows = {"text_hash": hashes, "specialty": [names[0] for names in labels], "specialties": labels}
        settings = {"kind": "official", "seed": None, "near_threshold": None, "hashes": {}}
        splits = SimpleNamespace(notes={"test": Dataset.from_dict(rows)}, **settings)
        splits.assignment = SimpleNamespace(split=["test"] * 5)
        return data_facts(SimpleNamespace(source="x", fingerprint=None, mismatch=None, splits=splits, split=Split()))  # type: ignore[arg-type]

    found = facts(own)
    assert (found["test_conflicts"], found["test_several"], found["test_ceiling"]) == (2, 4, 1.0)
    assert found["classes"] == {"Bones": [0, 0, 4], "Heart": [0, 0, 4], "Nerves": [0, 0, 1]}
    assert facts([names[::-1] for names in own]) == found


def test_facts_follow_what_a_datamodule_has_read(llama: Path, notes_folder: Path, tmp_path: Path) -> None:
    data = tiny_datamodule(notes_folder, llama, split={"near_threshold": 0.8})
    assert data_facts(data) == {}
    splits = data.read_splits()
    facts = data_facts(data)
    assert (facts["split"], facts["seed"], facts["revision"]) == ("official", None, None)
    assert facts["near_threshold"] is None, "the source's own splits stay as they are"
    data.fingerprint = DataFingerprint("clinic/notes", "a" * 40, splits.hashes)
    assert data_facts(data)["revision"] == "a" * 40
    rows = [row for split in forty_notes().values() for row in split]
    one_table = tiny_datamodule(notes_folder, llama, source=str(write_csv(tmp_path / "notes.csv", rows)))
    one_table.read_splits()
    assert (data_facts(one_table)["split"], data_facts(one_table)["seed"]) == ("grouped", 3407)
