"""A run knows its split, its weights know their notes, and whoever uses them on other notes is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch
from fakes import notes, write_csv, write_notes

from medlit.data.notes import hash_text

if TYPE_CHECKING:
    from conftest import Medlit

TOLD = "was trained with"


@pytest.fixture
def other_train(tmp_path: Path) -> Path:
    """The forty notes with one of the training notes another one."""
    folder = write_notes(tmp_path / "other")
    rows = notes()["train"]
    rows[7]["transcription"] += " Seen again."
    write_csv(folder / "train.csv", rows)
    return folder


def kept(path: Path) -> dict[str, Any]:
    """What a checkpoint keeps of its notes."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    found: dict[str, Any] = checkpoint["TranscriptionDataModule"]["notes"]
    return found


def test_a_fit_records_every_note_s_split_and_no_text(fitted: Path) -> None:
    record = pd.read_parquet(fitted / "split.parquet")
    wanted = [(row["id"], split, hash_text(row["transcription"])) for split, rows in notes().items() for row in rows]
    assert list(record.columns) == ["id", "split", "text_hash"]
    assert list(record.itertuples(index=False, name=None)) == wanted


def test_checkpoints_and_adapter_know_their_notes(fitted: Path, notes_folder: Path) -> None:
    found = kept(fitted / "checkpoints" / "best.ckpt")
    assert found == kept(fitted / "checkpoints" / "last.ckpt")
    assert (found["source"], found["revision"]) == (str(notes_folder), None)
    assert found["hashes"].keys() == notes().keys()
    assert len(set(found["hashes"].values())) == 3
    assert json.loads((fitted / "adapter" / "medlit.json").read_text())["data"] == found


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_other_notes_than_the_checkpoint_s_are_told_and_used(
    medlit: Medlit, run: Path, tiny_config: Path, other_train: Path, verb: str
) -> None:
    before = (run / "split.parquet").read_bytes()
    arguments = [verb, "--config", tiny_config, "--ckpt_path", "best"]
    same, other = medlit(*arguments), medlit(*arguments, "--data.source", other_train)
    assert (same.code, other.code) == (0, 0)
    assert TOLD not in same.err
    said = [line for line in other.err.splitlines() if TOLD in line]
    assert len(said) == 1
    assert said[0].startswith("medlit: the train split is not what the checkpoint was trained with (data.source was ")
    assert str(other_train) in said[0]
    assert (run / "split.parquet").read_bytes() == before, "the split of the fit stays on record"


def test_other_notes_than_an_adapter_s_are_told_and_the_new_run_s_split_is_recorded(
    medlit: Medlit, run: Path, tiny_config: Path, other_train: Path
) -> None:
    adapter = shutil.copytree(run / "adapter", run.parents[2] / "adapter")
    arguments = ["test", "--config", tiny_config, "--model.adapter", adapter]
    same, other = medlit(*arguments), medlit(*arguments, "--data.source", other_train)
    assert TOLD not in same.err
    assert f"the train split is not what the adapter {adapter} was trained with" in other.err
    hashes = [pd.read_parquet(run.with_name(f"version_{n}") / "split.parquet")["text_hash"][7] for n in (0, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_note_or_a_table_of_its_own_is_no_split(medlit: Medlit, run: Path, tiny_config: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "new.csv", [{"transcription": "A knee."}])
    best = run / "checkpoints" / "best.ckpt"
    arguments = ["predict", "--config", tiny_config, "--ckpt_path", best, "--run_dir", tmp_path / "new"]
    for what in (["--data.predict.text", "A knee."], ["--data.predict.source", table]):
        outcome = medlit(*arguments, *what)
        assert outcome.code == 0
        assert TOLD not in outcome.err
    assert not (tmp_path / "new" / "split.parquet").exists()
