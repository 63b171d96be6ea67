"""Does a 70B fit one large GPU, is its memory what the estimate says, and what would a 405B need?

    LLAMA_TOKENIZER=folder python benchmarks/large.py --folder DIR     one GPU of 80 GB, DIR with 45 GB free, 5 minutes
    python benchmarks/large.py --table benchmarks/results/large.json   the result for README.md
    python benchmarks/large.py --tiny --folder DIR --output FILE.json  a two-layer model on the CPU, a minute

A Llama of the 70B's shape is written with random weights, a layer at a time and in 4 bits, as its repository on the Hub
holds it. `medlit fit` with `configs/models/llama31_70b.yaml` then trains it for three steps of 32 notes as long as real
ones, with a clock beside it. Two estimates are held against the measured peak: the doctor's, from the configuration
alone, and the one by which the fit chooses how many layers are computed again. The last rows are estimates only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src"), str(HERE.parent / "tests")]
CONFIGS = HERE.parent / "configs"
GIB = 2**30
STEPS, NOTES = 3, 32
BEGIN = time.perf_counter()
# Notes of a micro-batch in training and in an evaluation, as the two configs have them, and a packed micro-batch's
# tokens: those of the notes of `shapes.py`, 779 each.
BATCHES = {"8B": (8, 32), "70B": (4, 16), "405B": (1, 4)}
MEAN_TOKENS, BUDGET = 779, 2048


def main(argv: list[str] | None = None) -> None:
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "large.json")
    parser.add_argument("--folder", type=Path, help="for the weights, which are removed again")
    parser.add_argument("--table", type=Path, help="print this result as Markdown and do nothing else")
    parser.add_argument("--tiny", action="store_true", help="a two-layer model on the CPU")
    options = parser.parse_args(argv)
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        result = measure(Path(scratch), options.tiny)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


def say(*words: object) -> None:
    """Tell the time and what is going on."""
    print(f"[{time.perf_counter() - BEGIN:4.0f} s]", *words, file=sys.stderr, flush=True)


def measure(scratch: Path, tiny: bool) -> dict[str, Any]:
    """Write the model, train it, and set the estimates beside it."""
    import torch

    names = ("torch", "lightning", "unsloth", "transformers", "peft", "bitsandbytes")
    result: dict[str, Any] = {
        "hardware": "CPU" if tiny else torch.cuda.get_device_name(),
        "versions": {name: importlib.metadata.version(name) for name in names} | {"torch": torch.__version__},
        "date": datetime.now(UTC).date().isoformat(),
    }
    weights = scratch / "llama"
    # In a process of its own, whose GPU memory is free again afterwards.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        other.submit(write, weights, tiny).result()
    size = sum(path.stat().st_size for path in weights.iterdir()) / 1e9
    result["weights_gb"] = round(size, 1)
    say(f"{size:.1f} GB of weights are there")
    result["trained"] = train(scratch, weights, tiny)
    say(json.dumps(result["trained"]))
    result["estimates"] = {size: estimate(size) for size in BATCHES}
    return result


def write(weights: Path, tiny: bool) -> None:
    """The weights and their tokenizer."""
    from shapes import llama_config, llama_tokenizer, write_llama_4bit

    if tiny:
        from fakes import write_llama
        from transformers import LlamaConfig

        write_llama(weights)
        write_llama_4bit(weights, LlamaConfig.from_pretrained(weights), "cpu")
        (weights / "model.safetensors").unlink()
        return
    weights.mkdir()
    llama_tokenizer().save_pretrained(weights)
    write_llama_4bit(weights, llama_config("70B"), "cuda")


def train(scratch: Path, weights: Path, tiny: bool) -> dict[str, Any]:
    """Three steps of `medlit fit`; what its clock said."""
    from shapes import write_notes

    from medlit.weights import load_tokenizer

    shrink = 8 if tiny else 1
    notes = write_notes(scratch / "notes", load_tokenizer(str(weights)), STEPS * NOTES, 66 // shrink, shrink)
    settings: dict[str, Any] = {
        "trainer": {
            "max_steps": STEPS,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 1,
            "callbacks": [{"class_path": "fit_clock.FitClock", "init_args": {"folder": str(scratch)}}],
        },
        "val_every_steps": STEPS,
        "run": str(scratch / "run"),
        "model": {"backbone": {"base_model": str(weights)}},
        "data": {"source": str(notes), "split": "official"},
    }
    if tiny:
        settings["trainer"] |= {"accelerator": "cpu"}
        settings["model"]["backbone"]["max_length"] = 512
    (scratch / "fit.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "medlit", "fit"]
    for config in (CONFIGS / "llama31_8b.yaml", CONFIGS / "models" / "llama31_70b.yaml", scratch / "fit.json"):
        command += ["--config", str(config)]
    path = os.pathsep.join([str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    begin = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path}, stdout=sys.stderr)
    clock = json.loads((scratch / "rank0.json").read_text())
    found = {
        "seconds": [round(second, 2) for second in clock["seconds"]],
        "tokens": clock["tokens"],
        "largest_micro_batch": clock["largest"],
        "layers_kept": clock["layers_kept"],
        "minutes_with_loading_and_validation": round((time.perf_counter() - begin) / 60, 1),
    }
    if "peak_bytes" in clock:
        found["peak_gib"] = round(clock["peak_bytes"] / GIB, 2)
        found["estimated_gib"] = round(clock["estimated_bytes"] / GIB, 2)
    return found


def estimate(size: str) -> dict[str, float]:
    """GiB that the doctor says a Llama takes at the least, with every layer but one computed again."""
    import torch
    from shapes import llama_config

    from medlit.model.settings import Backbone, Lora
    from medlit.tools.doctor.fits import need

    notes, answered = BATCHES[size]
    backbone = Backbone(gradient_checkpointing="unsloth")
    takes = need(
        llama_config(size),
        backbone,
        Lora(),
        notes * MEAN_TOKENS,
        # As many padded tokens as the evaluation's budget lets through.
        min(answered, notes) * BUDGET,
        torch.device("cuda"),
        torch.bfloat16,
    )
    parts = {"weights": takes.weights, "adapter": takes.adapter, "training": takes.training}
    return {name: round(value / GIB, 2) for name, value in (parts | {"total": takes.total}).items()}


def table(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    trained = result["trained"]
    rate = trained["tokens"][-1] / trained["seconds"][-1]
    low, high = trained["layers_kept"] or ("all", "all")
    lines = [
        f"{result['hardware']}, {result['date']}: {versions}.",
        "",
        f"{result['weights_gb']} GB of 4-bit weights; three steps took {', '.join(map(str, trained['seconds']))} s"
        f" ({rate:,.0f} tokens/s in the last), with {low} to {high} layers kept;"
        f" {trained['minutes_with_loading_and_validation']} minutes with loading and a validation.",
    ]
    if "peak_gib" in trained:
        off = trained["estimated_gib"] / trained["peak_gib"] - 1
        lines += [
            f"Peak {trained['peak_gib']} GiB, estimated by the fit {trained['estimated_gib']} GiB ({off:+.1%}).",
        ]
    lines += ["", "| Llama 3.1 | 4-bit weights | adapter and optimizer | training, at the least | in all, GiB |"]
    lines += ["| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {size} | {row['weights']} | {row['adapter']} | {row['training']} | {row['total']} |"
        for size, row in result["estimates"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
