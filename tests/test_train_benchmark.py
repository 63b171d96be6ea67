"""The training benchmark runs on the tiny model, and its file holds what its table shows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


def test_every_system_has_a_place_in_the_table_and_its_peers_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    import train
    import train_trl

    assert sorted(train.ORDER) == sorted([*train.MEDLIT, *train.PEERS])
    assert sorted(train.PEERS) == sorted(train_trl.SYSTEMS)


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)")
def test_a_tiny_run_measures_and_prints(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script puts its neighbours there
    monkeypatch.setenv("UNSLOTH_BLOCK_COMPILE", "1")  # the script turns it
    import train

    out = tmp_path / "results" / "train.json"
    train.main(["--tiny", "--systems", "medlit_24gib", "--steps", "2", "--warm_up", "1", "--out", str(out)])
    levers = tmp_path / "levers.json"
    train.main(["--tiny", "--only", "levers", "--limit", "0", "--out", str(levers)])
    result = json.loads(out.read_text())
    assert "failed" not in result
    assert result.keys() >= {"hardware", "versions", "date", "matmul_tflops"}
    assert len({row["lever"] for row in result["levers"]}) == 8
    assert len(json.loads(levers.read_text())["not_begun"]) == 8, "no time was given"
    (row,) = result["systems"]
    assert (row["system"], row["steps"], len(row["step_seconds"])) == ("medlit_24gib", 2, 3)
    assert row["spread"][0] <= row["tokens_per_second"] <= row["spread"][1]
    assert 0 < row["padding"] < 0.3
    for way in result["parity"]:
        assert abs(way["loss"]) < 1e-5
        assert way["gradient"] < 1e-4
    capsys.readouterr()
    train.main(["--table", str(out)])
    shown = capsys.readouterr().out
    assert "| default, 2 micro-batches a step | 80 |" in shown
    assert f"| `medlit_24gib` | {row['notes_per_second']} | {row['tokens_per_second']:,} (" in shown
