"""The benchmarks run: on a tiny model, so that they are not found broken on a rented GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a process that it starts finds its functions by name
    spec.loader.exec_module(module)
    return module


def test_every_decoder_is_measured(llama: Path, tmp_path: Path) -> None:
    parts = ["systems", "padded", "parity", "validation_in_fit"]
    benchmark("evaluate").main(["--tiny", "--only", *parts, "--output", str(tmp_path / "evaluate.json")])
    found = json.loads((tmp_path / "evaluate.json").read_text())
    assert {"hardware", "versions", "date", "systems", "parity", "validation_in_fit"} <= set(found)
    systems = {row["system"]: row for row in found["systems"]}
    assert {"recipe_32", "recipe_4", "generate", "constrained", "likelihood", "likelihood_padded"} <= set(systems)
    assert all(row["notes_per_second"] > 0 for row in systems.values())
    # Nothing is rounded to 16 bits here.
    for parity in found["parity"].values():
        assert parity["same_label"] == parity["notes"] == 3
        assert parity["largest_change_of_a_log_likelihood"] < 1e-3


@pytest.mark.slow
def test_training_starts_on_a_written_table(tmp_path: Path) -> None:
    audit = benchmark("audit")
    audit.write_notes(tmp_path / "notes.csv", 60)
    assert audit.start_training(tmp_path / "notes.csv").startswith("train ")
    assert (tmp_path / "split.parquet").stat().st_size > 0


@pytest.mark.slow
def test_every_way_is_near_the_truth_of_stock_libraries_in_float32(llama: Path, tmp_path: Path) -> None:
    benchmark("train_parity").main(["--tiny", "--output", str(tmp_path / "parity.json")])
    found = json.loads((tmp_path / "parity.json").read_text())
    assert found["notes"]["count"] == 16
    assert {"plain", "plain, one note at a time", "packed and compiled"} <= {row["way"] for row in found["ways"]}
    for row in found["ways"]:
        assert abs(row["loss"]) < 1e-5
        assert row["gradient"] < 1e-4


@pytest.mark.slow
def test_curves_of_packed_and_padded_notes_are_one(llama: Path, tmp_path: Path) -> None:
    flags = f"--model.language_model.base_model {llama} --trainer.accelerator cpu --data.max_response_tokens 20"
    benchmark("curve").main(["--steps", "3", "--output", str(tmp_path / "curve.json"), "--flags", flags])
    found = json.loads((tmp_path / "curve.json").read_text())
    assert {len(curve) for curve in found["curves"].values()} == {3}
    gaps = {row["compared"]: row["largest_step"] for row in found["gaps"]}
    assert gaps["packed beside padded, first seed"] < 1e-6 < gaps["padded, second seed beside first"]
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_the_predictor_is_measured_beside_its_decoder(llama: Path, tmp_path: Path) -> None:
    flags = ["--base_model", llama, "--notes", 5, "--rounds", 2, "--output", tmp_path / "predictor.json"]
    benchmark("predictor").main(list(map(str, flags)))
    found = json.loads((tmp_path / "predictor.json").read_text())
    assert [row["mode"] for row in found["systems"]] == ["generate", "constrained", "likelihood"]
    assert all(len(row["ratios"]) == 2 and row["ratio"] > 0 for row in found["systems"])


@pytest.mark.slow
def test_the_service_is_measured_beside_the_predictor(llama: Path, tmp_path: Path) -> None:
    flags = ["--base_model", llama, "--notes", 8, "--rounds", 3, "--requests", 2, 8, 32, "--malformed", 100]
    benchmark("serve").main(list(map(str, [*flags, "--port", 8767, "--output", tmp_path / "serve.json"])))
    found = json.loads((tmp_path / "serve.json").read_text())
    assert [row["clients"] for row in found["clients"]] == [1, 8, 32]
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in found["clients"])
    for rate in (found["notes_per_second"], found["notes_per_cpu_second"]):
        assert len(rate["shares"]) == 3
        assert rate["share"] == sorted(rate["shares"])[1]
    assert sum(found["malformed"].values()) == 100
    assert all(code.startswith("4") for code in found["malformed"])
    assert found["tracebacks"] == 0


def test_tokenizing_is_measured_on_one_core_and_on_all(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # what it sets itself is undone
    flags = ["--base_model", llama, "--notes", 50, "--rounds", 2, "--output", tmp_path / "tokens.json"]
    benchmark("tokens").main(list(map(str, flags)))
    found = json.loads((tmp_path / "tokens.json").read_text())
    assert found["notes"] == 50
    assert list(found["milliseconds_a_note"]) == ["one core", "all cores"]
    assert len(found["ratios"]) == 2


def test_labels_are_measured_by_stage(tmp_path: Path) -> None:
    module, out = benchmark("labels"), tmp_path / "labels.json"
    module.main(["--labels", "3", "70", "--stages", "intervals and scores", "--notes", "20", "--output", str(out)])
    found = json.loads(out.read_text())
    assert [(row["labels"], row["stage"]) for row in found["stages"]] == [(k, "intervals and scores") for k in (3, 70)]
    assert all(row["seconds"] >= 0 for row in found["stages"])
    assert "| intervals and scores |" in module.table(found)


@pytest.mark.slow
def test_several_processes_are_measured_beside_one(tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    benchmark("scaling").main(["--tiny", "--steps", "2", "--curve", "4", "--output", str(out)])
    found = json.loads(out.read_text())
    systems = {row["system"]: row for row in found["systems"]}
    assert list(systems) == ["strong_1", "strong_2", "weak_2"]
    assert [row["notes_a_step"] for row in found["systems"]] == [32, 32, 64]
    assert 0 < systems["weak_2"]["all_reduce"] <= systems["weak_2"]["exchange_and_waiting"] < 1
    (same,) = found["same"]
    assert same["gradient"] < 1e-5
    assert same["loss_largest"] < 1e-3
    assert [len(curve) for curve in found["curves"].values()] == [4, 4]
    assert out.with_suffix(".png").is_file()
    assert "| 2 | 64 |" in benchmark("scaling").table(found)


@pytest.mark.slow
def test_a_model_written_in_4_bit_is_trained_and_estimated(tmp_path: Path) -> None:
    out = tmp_path / "large.json"
    benchmark("large").main(["--tiny", "--folder", str(tmp_path), "--output", str(out)])
    found = json.loads(out.read_text())
    assert len(found["trained"]["seconds"]) == 3
    # The weights alone: 70.6 and 405.9 thousand million numbers.
    assert [found["estimates"][size]["weights"] for size in ("70B", "405B")] == pytest.approx([36.8, 200.8], abs=0.1)
    assert "| 405B |" in benchmark("large").table(found)
    assert [path.name for path in tmp_path.iterdir()] == ["large.json"], "the weights are gone"


@pytest.mark.slow
def test_a_large_model_is_trained_beside_a_divided_one(tmp_path: Path) -> None:
    out = tmp_path / "offload.json"
    flags = ["--tiny", "--folder", str(tmp_path), "--output", str(out), "--how", "offload", "balanced"]
    benchmark("offload").main(flags)
    fit, divided = json.loads(out.read_text())["rows"]
    assert (fit["how"], divided["how"]) == ("offload", "balanced")
    assert min(fit["tokens_per_second"], divided["tokens_per_second"]) > 0
    assert (fit["offloaded_layers"], fit["resumed"]) == (0, False), "on a CPU"
    assert len(divided["losses"]) == 3
    assert "| 8B | 2 | 6 | balanced | 1 |" in benchmark("offload").table(json.loads(out.read_text()))
    assert [path.name for path in tmp_path.iterdir()] == ["offload.json"], "the weights are gone"


@pytest.mark.slow
def test_the_steps_of_a_fit_are_timed(llama: Path, tmp_path: Path) -> None:
    out, steps = tmp_path / "steps.json", 13
    script = [sys.executable, FOLDER / "steps.py", "--name", "now", "--output", out]
    fit = ["fit", "--config", FOLDER.parent / "configs" / "quickstart.yaml", "--run_dir", tmp_path / "run"]
    settings = {
        "model.language_model.base_model": llama,
        "model.language_model.max_length": 512,
        "data.max_response_tokens": 32,
        "model.decoding.max_new_tokens": 32,
        "data.batching.global_batch_size": 2,
        "data.batching.micro_batch_size": 1,
        "trainer.max_steps": steps,
        "trainer.limit_val_batches": 1,
        "val_every_steps": steps,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    subprocess.run([*map(str, (*script, *fit, *flags))], check=True)
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["name"], row["steps"]) == ("now", steps - 10 - 1)
    assert row["seconds_per_step"] > 0
