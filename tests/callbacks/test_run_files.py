"""A run records its split, its weights record their notes, and using them on other notes gives a warning."""

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

WARNING = "was trained with"


@pytest.fixture
def other_train(tmp_path: Path) -> Path:
    """The forty notes with one of the training notes another one."""
    folder = write_notes(tmp_path / "other")
    rows = notes()["train"]
    rows[7]["transcription"] += " Seen again."
    write_csv(folder / "train.csv", rows)
    return folder


def fingerprint_in(path: Path) -> dict[str, Any]:
    """The data fingerprint in a checkpoint."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    fingerprint: dict[str, Any] = checkpoint["TranscriptionDataModule"]["notes"]
    return fingerprint


def test_a_fit_records_the_split_of_every_note_and_no_text(fitted: Path) -> None:
    record = pd.read_parquet(fitted / "split.parquet")
    wanted = [(row["id"], split, hash_text(row["transcription"])) for split, rows in notes().items() for row in rows]
    assert list(record.columns) == ["id", "split", "text_hash"]
    assert list(record.itertuples(index=False, name=None)) == wanted


def test_checkpoints_and_adapter_record_their_notes(fitted: Path, notes_folder: Path) -> None:
    fingerprint = fingerprint_in(fitted / "checkpoints" / "best.ckpt")
    assert fingerprint == fingerprint_in(fitted / "checkpoints" / "last.ckpt")
    assert (fingerprint["source"], fingerprint["revision"]) == (str(notes_folder), None)
    assert fingerprint["hashes"].keys() == notes().keys()
    assert len(set(fingerprint["hashes"].values())) == 3
    assert json.loads((fitted / "adapter" / "medlit.json").read_text())["data"] == fingerprint


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_other_notes_than_the_checkpoint_s_give_a_warning_and_are_used(
    run_medlit: Medlit, run: Path, tiny_config: Path, other_train: Path, verb: str
) -> None:
    before = (run / "split.parquet").read_bytes()
    arguments = [verb, "--config", tiny_config, "--ckpt_path", "best"]
    same, other = run_medlit(*arguments), run_medlit(*arguments, "--data.source", other_train, "--overwrite")
    assert (same.code, other.code) == (0, 0)
    assert WARNING not in same.err
    warnings = [line for line in other.err.splitlines() if WARNING in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(
        "medlit: the train split is not what the checkpoint was trained with (data.source was "
    )
    assert str(other_train) in warnings[0]
    assert (run / "split.parquet").read_bytes() == before, "the split of the fit stays on record"
    if verb == "test":
        report, data = (run / "report.md").read_text(), json.loads((run / "test_facts.json").read_text())["data"]
        assert data["mismatch"] == warnings[0].removeprefix("medlit: ")
        assert f"Warning: {data['mismatch']}" in report
        assert "whose text is in train" not in report, "which is not the train split of the weights"


def test_other_notes_than_an_adapter_s_give_a_warning_and_the_new_run_s_split_is_recorded(
    run_medlit: Medlit, run: Path, tiny_config: Path, other_train: Path
) -> None:
    adapter = shutil.copytree(run / "adapter", run.parents[2] / "adapter")
    arguments = ["test", "--config", tiny_config, "--model.adapter", adapter]
    same, other = run_medlit(*arguments), run_medlit(*arguments, "--data.source", other_train)
    assert WARNING not in same.err
    assert f"the train split is not what the adapter {adapter} was trained with" in other.err
    hashes = [pd.read_parquet(run.with_name(f"version_{n}") / "split.parquet")["text_hash"][7] for n in (0, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_single_note_or_another_table_has_no_split(
    run_medlit: Medlit, run: Path, tiny_config: Path, tmp_path: Path
) -> None:
    table = write_csv(tmp_path / "new.csv", [{"transcription": "A knee."}])
    best = run / "checkpoints" / "best.ckpt"
    arguments = ["predict", "--config", tiny_config, "--ckpt_path", best, "--run_dir", tmp_path / "new"]
    for what in (["--data.predict.text", "A knee."], ["--data.predict.source", table]):
        outcome = run_medlit(*arguments, *what)
        assert outcome.code == 0
        assert WARNING not in outcome.err
    assert not (tmp_path / "new" / "split.parquet").exists()
