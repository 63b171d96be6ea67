"""The families benchmark runs on tiny models, keeps what it measured, and joins its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

MEASURED = {
    "padding": 0.0,
    "peak_gib": 20.0,
    "estimated_gib": 21.0,
    "first_step_seconds": 30.0,
    "graphs_compiled_after_warm_up": 0,
    "lora_parameters": 9_000_000,
    "packs": True,
}
PEER = {"setting": "16 x 2 notes", "padding_free": True, "estimated_gib": None}


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: ANN401 - a module
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script puts its neighbours there
    import families

    return families


def _file(path: Path, family: str, *rows: dict[str, Any], hardware: str = "H100") -> Path:
    entry = {"family": family, "systems": list(rows)}
    path.write_text(json.dumps({"hardware": hardware, "versions": {}, "date": "2026-11-28", "families": [entry]}))
    return path


def _row(system: str, speed: int, **others: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"system": system, "tokens_per_second": speed, **MEASURED, **others}


def test_results_of_several_runs_are_joined_and_shown(families: Any, tmp_path: Path) -> None:  # noqa: ANN401
    medlit, broken = _row("medlit_80gib", 30), {"system": "medlit_80gib", "error": "RuntimeError: a | b"}
    peers = [_row("unsloth_trl", 10, **PEER), _row("unsloth_trl_tuned", 20, **PEER)]
    files = [
        _file(tmp_path / "a.json", "qwen3_8b", medlit),
        _file(tmp_path / "b.json", "qwen3_8b", *peers, broken),
        _file(tmp_path / "c.json", "mistral_7b", broken),
    ]
    out = tmp_path / "all.json"
    families.main(["--merge", *map(str, files), "--out", str(out)])
    result = json.loads(out.read_text())
    mistral, qwen = result["families"]
    assert (mistral["family"], qwen["family"]) == ("mistral_7b", "qwen3_8b")
    assert [row["system"] for row in qwen["systems"]] == ["unsloth_trl", "unsloth_trl_tuned", "medlit_80gib"]
    assert (qwen["systems"][2]["x_unsloth_trl"], qwen["systems"][2]["x_unsloth_trl_tuned"]) == (3.0, 1.5)
    assert mistral["systems"] == [broken], "an error stays where there is no figure"
    lines = families.table(result).splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    with pytest.raises(SystemExit, match="different hardware"):
        families.merge([result, json.loads(_file(tmp_path / "d", "qwen3_8b", hardware="H200").read_text())])


def test_widths_and_windows_are_the_published_ones() -> None:
    from shapes import FAMILIES, family_config

    configs = {name: family_config(name) for name in FAMILIES}
    assert {config.num_hidden_layers for config in configs.values()} == {8}
    assert configs["gemma3_4b"].layer_types.count("sliding_attention") == 7
    assert configs["gemma2_9b"].layer_types.count("sliding_attention") == 4
    windows = {name: getattr(config, "sliding_window", None) or None for name, config in configs.items()}
    assert {name: window for name, window in windows.items() if window} == {
        "phi35_mini_fused": 262144,
        "gemma2_9b": 4096,
        "gemma3_4b": 1024,
    }


@pytest.mark.slow
def test_a_tiny_run_measures_a_family_beside_its_peer(
    families: Any,  # noqa: ANN401
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "families.json"
    flags = "--tiny --steps 1 --warm_up 1 --families phi35_mini_fused --systems unsloth_trl_tuned medlit_80gib"
    settings = ["16 x 2 notes", "packed rows x 2"]
    families.main([*flags.split(), "--settings", *settings, "--out", str(out)])
    result = json.loads(out.read_text())
    assert result.keys() == {"hardware", "versions", "date", "families"}
    (entry,) = result["families"]
    peer, ours = entry["systems"]
    assert (peer["system"], ours["system"]) == ("unsloth_trl_tuned", "medlit_80gib")
    assert peer["supervised_tokens"] == ours["supervised_tokens"] > 0
    assert peer["lora_parameters"] == ours["lora_parameters"] > 0
    assert peer["layers_recomputed"] == 0
    first, packed = peer["tried"]
    assert first["tokens_per_second"] == peer["tokens_per_second"] > 0
    assert packed["error"] == "ValueError: Unsloth does not pack this model here", "on a CPU"
    assert ours["x_unsloth_trl_tuned"] == pytest.approx(ours["tokens_per_second"] / peer["tokens_per_second"], abs=0.01)
    assert "| phi35_mini_fused | `medlit_80gib` |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_family_that_fails_is_a_row_and_the_next_is_measured(
    families: Any,  # noqa: ANN401
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(families.FAMILIES, "unknown", ("llama31_8b", {}))  # train.py does not know it
    out = tmp_path / "families.json"
    flags = "--tiny --steps 1 --warm_up 1 --families unknown llama31_8b --systems medlit_24gib --out"
    families.main([*flags.split(), str(out)])
    failed, measured = (entry["systems"][0] for entry in json.loads(out.read_text())["families"])
    assert failed == {"system": "medlit_24gib", "error": "the process ended with code 2"}
    assert measured["tokens_per_second"] > 0


def test_nothing_is_begun_without_time(families: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: ANN401
    families.main(["--limit", "0", "--families", "qwen3_8b", "--out", str(tmp_path / "none.json")])
    assert "qwen3_8b medlit_24gib" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()
