"""The benchmarks run: on a tiny model, so that they are not found broken on a rented GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_every_decoder_is_measured(llama: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("evaluate", FOLDER / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {"notes": 5, "recipe_notes": 1, "parity_notes": 3, "fit_steps": 1, "max_length": 256}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    module.main(["--base_model", str(llama), "--output", str(tmp_path / "evaluate.json"), *flags])
    found = json.loads((tmp_path / "evaluate.json").read_text())
    assert {"hardware", "versions", "date", "systems", "parity", "validation_in_fit"} <= set(found)
    systems = {row["system"]: row for row in found["systems"]}
    assert {"recipe_32", "recipe_4", "generate", "constrained", "likelihood"} <= set(systems)
    assert all(row["notes_per_second"] > 0 for row in systems.values())
    # Nothing is rounded to 16 bits here.
    for parity in found["parity"].values():
        assert parity["same_label"] == parity["notes"] == 3
        assert parity["largest_change_of_a_log_likelihood"] < 1e-3
