"""Train models larger than the GPU memory they may use: layers that do not fit stay in host memory.

    LLAMA_TOKENIZER=folder python benchmarks/offload.py --folder DIR --models 8B:6 8B:8 70B:24    DIR with 45 GB free
    python benchmarks/offload.py --table benchmarks/results/offload.json   the result for README.md
    python benchmarks/offload.py --tiny --folder DIR --output FILE.json    a two-layer model on the CPU, a minute

A model is `size:budget` or `size:budget:layers`, in GiB of GPU memory and decoder layers (all by default). A Llama of
that width is written with random weights, in 4 bits, and `medlit fit` with `configs/hardware/offload_24gb.yaml` trains
it for three steps of 32 notes as long as real ones within the budget, then validates 16 notes by likelihood; with
`--resume` the fit continues from its checkpoint for one more step. Rows are added to the result; one of the same model,
budget and layers is replaced.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src"), str(HERE.parent / "tests")]

from clocked_fit import describe, fit, say  # noqa: E402

GIB = 2**30
STEPS, NOTES = 3, 32
KEY = ("model", "budget_gib", "layers")


def main(argv: list[str] | None = None) -> None:
    """Measure, or show a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "offload.json")
    parser.add_argument("--folder", type=Path, help="for the weights, which are removed again")
    parser.add_argument("--models", nargs="+", default=["8B:6", "8B:8", "70B:24"], metavar="SIZE:GIB[:LAYERS]")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint for another step")
    parser.add_argument("--table", type=Path, help="print this result as Markdown and do nothing else")
    parser.add_argument("--tiny", action="store_true", help="a two-layer model on the CPU")
    options = parser.parse_args(argv)
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for model in ["8B:6:2"] if options.tiny else options.models:
        size, budget, *layers = model.split(":")
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            row = measure(Path(scratch), size, float(budget), int(layers[0]) if layers else None, options)
        add(options.output, row, options.tiny)
    print(table(json.loads(options.output.read_text())))


def add(output: Path, row: dict[str, Any], tiny: bool) -> None:
    """Write a row into the result."""
    import torch

    result = describe("CPU" if tiny else torch.cuda.get_device_name())
    old = json.loads(output.read_text())["rows"] if output.exists() else []
    result["rows"] = [*(each for each in old if any(each[key] != row[key] for key in KEY)), row]
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(scratch: Path, size: str, budget: float, layers: int | None, options: argparse.Namespace) -> dict[str, Any]:
    """Write a model and train it."""
    from shapes import LLAMAS, write_notes

    from medlit.base_model import load_tokenizer

    weights, shrink = scratch / "llama", 8 if options.tiny else 1
    # In a separate process, so that its GPU memory is free again afterwards.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        other.submit(write, weights, size, layers, options.tiny).result()
    say(f"{size}: {sum(path.stat().st_size for path in weights.iterdir()) / 1e9:.1f} GB of weights written")
    notes = write_notes(scratch / "notes", load_tokenizer(str(weights)), STEPS * NOTES, 66 // shrink, shrink)
    trainer: dict[str, Any] = {"max_steps": STEPS, "logger": False}
    files = ["hardware/offload_24gb.yaml", str(settings(scratch, budget))]
    (clock,) = fit(scratch, files, weights, notes, trainer, tiny=options.tiny)
    say(json.dumps(clock))
    if options.resume:
        files.append(str(settings(scratch, budget, ckpt_path="last")))
        fit(scratch, files, weights, notes, trainer | {"max_steps": STEPS + 1}, tiny=options.tiny)
        say("resumed for another step")
    return {
        "model": size,
        "layers": layers or LLAMAS[size][2],
        "budget_gib": budget,
        "tokens_per_second": round(sum(clock["tokens"][1:]) / sum(clock["seconds"][1:])),
        "peak_gib": round(clock.get("peak_bytes", 0) / GIB, 2),
        "estimated_gib": round(clock["estimated_bytes"] / GIB, 2),
        "host_gib": round(clock.get("host_bytes", 0) / GIB, 2),
        "offloaded_layers": clock.get("offloaded_layers", 0),
        "layers_kept": clock["layers_kept"],
        "largest_micro_batch": clock["largest"],
        "resumed": options.resume,
    }


def settings(scratch: Path, budget: float, **more: str) -> Path:
    """A config file with the budget and a validation by likelihood."""
    values: dict[str, Any] = {"model": {"language_model": {"memory_budget_gib": budget}}}
    values["model"]["decoding"] = {"mode": "likelihood"}
    path = scratch / f"budget{len(more)}.json"
    path.write_text(json.dumps({**values, **more}), encoding="utf-8")
    return path


def write(weights: Path, size: str, layers: int | None, tiny: bool) -> None:
    """The weights and their tokenizer."""
    from large import write as write_tiny
    from shapes import llama_config, llama_tokenizer, write_llama_4bit

    if tiny:
        write_tiny(weights, tiny)
        return
    config = llama_config(size)
    config.num_hidden_layers = layers or config.num_hidden_layers
    weights.mkdir()
    llama_tokenizer().save_pretrained(weights)
    write_llama_4bit(weights, config, "cuda")


def table(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{result['hardware']}, {result['date']}: {versions}.",
        "",
        "| Llama 3.1 | layers | budget, GiB | in host memory | kept | tokens/s | peak, GiB | estimated |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        kept = "all" if row["layers_kept"] is None else " to ".join(map(str, sorted(set(row["layers_kept"]))))
        host = f"{row['offloaded_layers']} layers, {row['host_gib']} GiB" if row["offloaded_layers"] else "none"
        cells = (row["model"], row["layers"], f"{row['budget_gib']:g}", host, kept, f"{row['tokens_per_second']:,}")
        lines.append("| " + " | ".join(map(str, (*cells, row["peak_gib"], row["estimated_gib"]))) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
