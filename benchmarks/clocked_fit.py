"""Run `medlit fit` as a user does and time its steps; for `scaling.py`, `large.py`, `offload.py` and `steps.py`."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs"
_BEGIN = time.perf_counter()
_PACKAGES = ("lightning", "unsloth", "transformers", "peft", "bitsandbytes")


def say(*words: object) -> None:
    """Print progress with the elapsed time."""
    print(f"[{time.perf_counter() - _BEGIN:4.0f} s]", *words, file=sys.stderr, flush=True)


def parser(doc: str | None, output: Path) -> argparse.ArgumentParser:
    """The arguments of a benchmark that writes its weights: where to, and what to do instead."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--output", type=Path, default=output)
    found.add_argument("--folder", type=Path, help="for the weights, which are removed again")
    found.add_argument("--table", type=Path, help="print this result as Markdown and do nothing else")
    found.add_argument("--tiny", action="store_true", help="a two-layer model on the CPU")
    return found


def describe(hardware: str) -> dict[str, Any]:
    """Hardware, versions and date of a result."""
    import torch

    versions = {"torch": torch.__version__} | {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"hardware": hardware, "versions": versions, "date": datetime.now(UTC).date().isoformat()}


def add_row(output: Path, row: dict[str, Any], key: Sequence[str], *, tiny: bool = False) -> None:
    """Write a row into a result; it replaces one that has the same values of `key`. `tiny`: measured on the CPU."""
    import torch

    result = describe(torch.cuda.get_device_name() if torch.cuda.is_available() and not tiny else "CPU")
    old = json.loads(output.read_text())["rows"] if output.exists() else []
    result["rows"] = [*(each for each in old if any(each[name] != row[name] for name in key)), row]
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def fit(
    folder: Path,
    configs: list[str],
    weights: Path,
    notes: Path,
    trainer: dict[str, Any],
    *,
    global_batch_size: int = 32,
    profiled: int = 0,
    gradient: bool = False,
    limit_gib: float = 0,
    tiny: bool = False,
) -> list[dict[str, Any]]:
    """Run the command, launched by Lightning; one batch is validated, after the last step.

    Args:
        folder: an existing one, for the run and what the clock leaves.
        configs: names in configs/, beside llama31_8b.yaml.
        weights: of the base model.
        notes: folder with a file for each split.
        trainer: settings of the trainer, with max_steps.
        global_batch_size: notes of an optimizer step.
        profiled: as of `fit_clock.FitClock`.
        gradient: likewise.
        limit_gib: likewise.
        tiny: on the CPU.

    Returns:
        What each process measured, by rank.
    """
    clock = {"folder": str(folder), "profiled": profiled, "gradient": gradient, "limit_gib": limit_gib}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 1}
    callbacks = [{"class_path": "fit_clock.FitClock", "init_args": clock}]
    settings: dict[str, Any] = {
        "trainer": quiet | trainer | {"callbacks": callbacks} | ({"accelerator": "cpu"} if tiny else {}),
        "val_every_steps": trainer["max_steps"],
        "run_dir": str(folder / "run"),
        "model": {"language_model": {"base_model": str(weights)} | ({"max_length": 512} if tiny else {})},
        "data": {
            "source": str(notes),
            "split": {"kind": "official"},
            "batching": {"global_batch_size": global_batch_size},
        },
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    files = [*(CONFIGS / name for name in ("llama31_8b.yaml", *configs)), folder / "settings.json"]
    command = [sys.executable, "-m", "medlit", "fit", *(part for file in files for part in ("--config", str(file)))]
    path = os.pathsep.join([str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path}, stdout=sys.stderr)
    ranks = [json.loads(file.read_text()) for file in folder.glob("rank*.json")]
    return sorted(ranks, key=lambda rank: rank["rank"])
